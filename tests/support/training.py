"""A training config and a data set small enough for tests."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np

CONFIG = """
out = "{folder}/run"
export = "{folder}/model"
threads = 2
precision = "fp32"
checkpoint_minutes = 100.0
[data]
kind = "digits"
path = "{folder}/mnist"
passes = 2
replacement = true
[vae.model]
block_out_channels = [4, 4, 4, 8]
layers_per_block = 1
norm_num_groups = 2
scaling_factor = 1.0
[vae.fit]
steps = {vae_steps}
batch_size = 4
warmup = 2
[unet.model]
block_out_channels = [8, 16]
layers_per_block = 1
transformer_layers_per_block = [1, 1]
num_attention_heads = [1, 2]
cross_attention_dim = 8
norm_num_groups = 4
[unet.text]
vocab_size = 0
hidden_size = 8
intermediate_size = 16
num_hidden_layers = 1
num_attention_heads = 1
max_position_embeddings = 16
[unet.scheduler]
prediction_type = "v_prediction"
rescale_betas_zero_snr = true
timestep_spacing = "trailing"
sampler = "ddim"
[unet.fit]
steps = {unet_steps}
batch_size = 8
warmup = 2
"""


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


def write_data(folder: Path) -> None:
    """Write a data set of 40 images of bars to `folder`/mnist, unless there is one."""
    mnist = folder / "mnist"
    if mnist.exists():
        return
    mnist.mkdir(parents=True)
    generator = np.random.default_rng(0)
    images = np.zeros((40, 28, 28), np.uint8)
    for image in images:
        top, left = generator.integers(5, 12, size=2)
        image[top : top + 10, left : left + 4] = 255
    write_idx(mnist / "train-images-idx3-ubyte.gz", images)
    write_idx(mnist / "train-labels-idx1-ubyte.gz", (np.arange(40) % 10).astype(np.uint8))


def write_config(folder: Path, vae_steps: int = 10, unet_steps: int = 10) -> Path:
    """Write a config and its data set; returns the config."""
    write_data(folder)
    config = folder / f"config_{vae_steps}_{unet_steps}.toml"
    text = CONFIG.format(folder=folder.as_posix(), vae_steps=vae_steps, unet_steps=unet_steps)
    config.write_text(text)
    return config
