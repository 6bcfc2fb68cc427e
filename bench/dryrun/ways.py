"""The ways of using a pipeline, each run whole on a fake GPU: text encoders, images, steps, decoder."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from bench.dryrun.device import DEVICE
from bench.dryrun.networks import HALF, components_of, on_gpu
from bench.dryrun.record import DryRecorder, DryRun
from bench.families import ModelFamily
from fastsd.config import ControlNetConfig, T2IAdapterConfig
from fastsd.errors import FastsdError
from fastsd.generate.control import Control
from fastsd.graph import Graphs
from fastsd.model.controlnet import ControlNet
from fastsd.model.t2i_adapter import T2IAdapter, adapter_downscale
from fastsd.pipeline import Pipeline
from fastsd.runtime.devices import why_no_fp8
from fastsd.weights.adapters.apply import Adapter


def _image(size: int) -> Image.Image:
    return Image.fromarray(np.random.RandomState(0).randint(0, 256, (size, size, 3), dtype=np.uint8))


def _mask(size: int) -> Image.Image:
    mask = np.zeros((size, size), dtype=np.uint8)
    mask[size // 4 : size // 2, size // 4 :] = 255
    return Image.fromarray(mask)


def _control(pipe: Pipeline, size: int) -> dict[str, Any]:
    net = on_gpu(ControlNet, ControlNetConfig(replace(pipe.components.unet.config, in_channels=4)))
    return {"controls": [Control(net, _image(size))]}


def _t2i_adapter(pipe: Pipeline, size: int) -> dict[str, Any]:
    """A full adapter of two blocks a level, as TencentARC's for SD 1 are."""
    unet, shrinks = pipe.components.unet.config, pipe.components.vae.config.downscale
    halves = tuple(level > 0 for level in range(len(unet.block_out_channels)))
    config = T2IAdapterConfig(3, unet.block_out_channels, 2, adapter_downscale(unet, shrinks), False, halves)
    return {"controls": [Control(on_gpu(T2IAdapter, config), _image(size))]}


def _lora(pipe: Pipeline, size: int) -> dict[str, Any]:
    """A LoRA of rank 4 for one layer of the UNet and one of the text encoder."""
    unet, text = pipe.components.unet.config, pipe.components.text_encoders[0].config
    depths = unet.transformer_layers_per_block
    level = next(i for i, depth in enumerate(depths) if depth)
    width = unet.block_out_channels[level]
    layers = {
        f"unet.down_blocks.{level}.attentions.0.transformer_blocks.0.attn1.to_q": width,
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": text.hidden_size,
    }
    pairs = [(f"{name}.lora_{part}.weight", width, part) for name, width in layers.items() for part in "AB"]
    state = {key: torch.ones((4, width) if part == "A" else (width, 4)) for key, width, part in pairs}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "lora.safetensors"
        save_file(state, file)
        pipe.set_adapters([Adapter(file)])
    return {}


def _embedding(pipe: Pipeline, size: int) -> dict[str, Any]:
    """A textual inversion of two tokens."""
    names = ("clip_l", "clip_g")
    encoders = pipe.components.text_encoders
    state = {name: torch.ones(2, encoder.config.hidden_size) for name, encoder in zip(names, encoders)}
    if len(state) == 1:
        state = {"emb_params": state["clip_l"]}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "style.safetensors"
        save_file(state, file)
        pipe.load_embedding(file)
    return {"prompt": "a cat in style"}


def _fp8(pipe: Pipeline, size: int) -> dict[str, Any]:
    """Raises `FastsdError` where the GPU does not multiply fp8."""
    reason = why_no_fp8(DEVICE)
    if reason is not None:
        raise FastsdError(reason)
    pipe._in_fp8()
    return {}


# The arguments of a call, and what is done to the pipeline before it.
WAYS: dict[str, Callable[[Pipeline, int], dict[str, Any]]] = {
    "text": lambda pipe, size: {},
    "image": lambda pipe, size: {"image": _image(size), "strength": 0.6, "num_inference_steps": 4},
    "inpaint": lambda pipe, size: {"image": _image(size), "mask_image": _mask(size), "strength": 1.0},
    "inpaint-model": lambda pipe, size: {"image": _image(size), "mask_image": _mask(size), "strength": 1.0},
    "control": _control,
    "t2i-adapter": _t2i_adapter,
    "lora": _lora,
    "refiner": lambda pipe, size: {"refiner_switch": 0.5},
    "hires": lambda pipe, size: {"hires_scale": 1.5},
    "tiled": lambda pipe, size: {"vae_tiling": True},
    "embedding": _embedding,
    "taesd": lambda pipe, size: {},
    "fp8": _fp8,
}


def generate(
    run: DryRun, family: ModelFamily, way: str = "text", batch: int = 1, size: int | None = None, **given: Any
) -> Any:
    """Make images in two steps, as a user does with this way.

    given: further arguments of the call.
    """
    size = family.size if size is None else size
    components = components_of(run, family, 9 if way == "inpaint-model" else 4, way == "taesd")
    second = replace(components_of(run, family), vae=components.vae) if way == "refiner" else None
    pipe = Pipeline(components, DEVICE, HALF, Graphs(DryRecorder(run)), second)
    arguments = {"prompt": "a cat", "seed": 1, "num_inference_steps": 2, "num_images_per_prompt": batch}
    if "image" not in way and "inpaint" not in way:
        arguments |= {"width": size, "height": size}
    return pipe(**arguments | WAYS[way](pipe, size) | given)
