"""Stable Diffusion 1.5 at its real size as one file and back: bit for bit the folder's image."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from fastsd.components import Components
from fastsd.config import CLIP_L, SD15_UNET, SD_VAE, SchedulerConfig
from fastsd.model.clip import TextEncoder
from fastsd.model.tokenizer import Tokenizer
from fastsd.model.unet import UNet
from fastsd.model.vae import AutoencoderKL
from fastsd.pipeline import Pipeline
from fastsd.weights import save_folder
from fastsd.weights.convert import convert
from fastsd.weights.inspect import inspect

pytestmark = pytest.mark.parity


def save_random_model(folder: Path) -> None:
    """Save a model with random weights, norms and biases too, so that none is 1 or 0."""
    torch.manual_seed(0)
    components = Components(
        UNet(SD15_UNET), AutoencoderKL(SD_VAE), (TextEncoder(CLIP_L),), (Tokenizer(),), SchedulerConfig(), 64
    )
    for _, module in components.networks():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    save_folder(components, folder, torch.float32)


def generate(path: Path) -> np.ndarray:
    pipe = Pipeline.from_pretrained(path, device="cpu", dtype="fp32")
    arguments = {"num_inference_steps": 1, "width": 256, "height": 256, "seed": 5, "output_type": "np"}
    return pipe("a lighthouse at dusk", negative_prompt="fog", **arguments).images


def test_full_size_single_file(tmp_path: Path) -> None:
    """One model is in memory at a time, 4.3 GB; the disk holds two."""
    folder, file, back = tmp_path / "folder", tmp_path / "file.safetensors", tmp_path / "back"
    try:
        save_random_model(folder)
        gc.collect()
        assert convert(folder, file) == []
        report = dict(inspect(file))
        assert report["family"].startswith("SD 1 (") and report["dtype"] == "F32 100%"
        assert report["missing keys"] == report["extra keys"] == report["wrong shapes"] == "none"
        expected = generate(folder)
        gc.collect()
        assert float(expected.std()) > 1e-3, "nothing to compare"
        np.testing.assert_array_equal(generate(file), expected)
        gc.collect()
        shutil.rmtree(folder)
        convert(file, back)
        np.testing.assert_array_equal(generate(back), expected)
    finally:
        for path in (folder, back):
            shutil.rmtree(path, ignore_errors=True)
        file.unlink(missing_ok=True)
