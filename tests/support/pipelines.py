"""A pipeline with tiny random networks, with graphs as tapes or without; an image and a mask for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastsd.components import Components
from fastsd.graph import Graphs
from fastsd.pipeline import Pipeline
from tests.support import tiny
from tests.support.tape import TapeRecorder

PHOTO = Image.fromarray(np.random.RandomState(0).randint(0, 256, (64, 64, 3), dtype=np.uint8))
MASK = Image.fromarray(np.kron(np.eye(2, dtype=np.uint8) * 255, np.ones((32, 32), dtype=np.uint8)))


def tiny_components(in_channels: int = 4, dtype: torch.dtype = torch.float32, steps: int = 3) -> Components:
    """A checkpoint of random weights that generates 64x64 images in `steps` steps by default."""
    vae = replace(tiny.VAE, block_out_channels=(8, 8, 16, 16))
    components = tiny.sd1(replace(tiny.UNET, in_channels=in_channels), vae)
    for network in (components.unet, components.vae, *components.text_encoders):
        network.to(dtype)
    components.defaults = {"num_inference_steps": steps}
    return components


def tiny_pipeline(in_channels: int = 4, dtype: torch.dtype = torch.float32) -> Pipeline:
    return Pipeline(tiny_components(in_channels, dtype), torch.device("cpu"), dtype)


def graphed_pipeline(max_graphs: int = 16, in_channels: int = 4) -> tuple[Pipeline, TapeRecorder]:
    """The same pipeline with graphs, and what records them."""
    recorder = TapeRecorder()
    graphs = Graphs(recorder, max_graphs)
    return Pipeline(tiny_components(in_channels), torch.device("cpu"), torch.float32, graphs), recorder


def latents(pipe: Pipeline, prompt: str | list[str] = "a cat", **arguments: Any) -> torch.Tensor:
    return pipe(prompt, **({"seed": 1, "output_type": "latent"} | arguments)).images
