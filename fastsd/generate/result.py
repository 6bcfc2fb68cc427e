"""What a call returns: images in the form asked for, and every setting that they depend on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastsd.generate.request import Request
from fastsd.parameters import recorded


@dataclass
class Result:
    """What a call returns.

    Attributes:
        images: a list of PIL images; or an array `[N, H, W, 3]` in [0, 1] ("np"), a tensor `[N, 3, H, W]` in [0, 1]
            ("pt"), or scaled latents `[N, C, h, w]` ("latent").
        seeds: one for each image.
        timings: seconds for "text", "encode", "steps", "decode", "total"; "steps_per_second".
        notes: what the user should know, a line each.
        parameters: the settings that the images depend on, as used: what a file stores of a call. Starting latents,
            SDXL's sizes and scores, and what a callback changed are not among them.
        own: of each image, the settings that it has for itself: its seed, and with some noise more.
        own_notes: of each image, those of `notes` that are on its own texts.
    """

    images: Any
    seeds: list[int]
    timings: dict[str, float]
    notes: list[str]
    parameters: dict[str, Any]
    own: list[dict[str, Any]] = field(default_factory=list)
    own_notes: list[tuple[str, ...]] = field(default_factory=list)

    @property
    def nsfw_content_detected(self) -> None:
        """None: as in diffusers without a safety checker, nothing was looked at."""


def convert_images(images: Sequence[Any], output_type: str) -> Any:
    """Arrays `[H, W, 3]` fp32 from 0 to 255 as "pil", rounded; as "np" or "pt", not rounded. See `Result`."""
    if output_type == "pil":
        return [Image.fromarray(image.round().astype(np.uint8)) for image in images]
    array = np.stack(images) / np.float32(255.0)
    return array if output_type == "np" else torch.from_numpy(array).permute(0, 3, 1, 2)


def join_batches(batches: list[Any], output_type: str) -> Any:
    """The images of all batches as one list, array or tensor."""
    if output_type == "pil":
        return [image for batch in batches for image in batch]
    return np.concatenate(batches) if output_type == "np" else torch.cat(batches)


def used_settings(request: Request) -> dict[str, Any]:
    """The settings that the images depend on; the prompts are lists, one for each image."""
    prompts = request.passes[0].prompts
    return recorded(request.settings) | {
        "prompts": [prompt.prompt for prompt in prompts.positive],
        "negative_prompts": [prompt.prompt for prompt in prompts.negative],
        "embeddings": list(prompts.embeddings),
    }
