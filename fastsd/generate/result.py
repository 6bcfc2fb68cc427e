"""What a call returns: pictures in the form asked for, and every setting that they depend on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastsd.generate.request import Request

SETTINGS = (
    "num_inference_steps",
    "guidance_scale",
    "guidance_rescale",
    "width",
    "height",
    "sampler",
    "schedule",
    "eta",
    "clip_skip",
    "hires_scale",
    "refiner_switch",
)


@dataclass
class Result:
    """What a call returns.

    Attributes:
        images: a list of PIL images; or an array `[N, H, W, 3]` in [0, 1] ("np"), a tensor `[N, 3, H, W]` in [0, 1]
            ("pt"), or scaled latents `[N, C, h, w]` ("latent").
        seeds: one for each image.
        timings: seconds for "text", "encode", "steps", "decode", "total"; "steps_per_second".
        notes: what the user should know, a line each.
        parameters: every setting that the images depend on, as used.
    """

    images: Any
    seeds: list[int]
    timings: dict[str, float]
    notes: list[str]
    parameters: dict[str, Any]


def in_form(images: list[Image.Image], output_type: str) -> Any:
    """Pictures as "pil", "np" or "pt", see `Result`."""
    if output_type == "pil":
        return images
    array = np.stack([np.asarray(image, dtype=np.float32) / 255.0 for image in images])
    return array if output_type == "np" else torch.from_numpy(array).permute(0, 3, 1, 2)


def joined(parts: list[Any], output_type: str) -> Any:
    """The pictures of all batches as one."""
    if output_type == "pil":
        return [image for part in parts for image in part]
    return np.concatenate(parts) if output_type == "np" else torch.cat(parts)


def settings(request: Request) -> dict[str, Any]:
    """The settings of a request; None is not stored in pictures."""
    second = request.hires
    return {name: getattr(request, name) for name in SETTINGS} | {
        "prompts": list(request.wording.prompts),
        "negative_prompts": list(request.wording.negative_prompts),
        "strength": request.strength if request.image is not None else None,
        "prompt_syntax": request.wording.syntax if request.wording.syntax != "a1111" else None,
        "embeddings": list(request.wording.embeddings),
        "hires_strength": second.strength if second else None,
        "hires_steps": second.num_inference_steps if second else None,
        "hires_upscaler": request.hires_upscaler if second else None,
    }
