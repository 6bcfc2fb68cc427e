"""The prompts, images and latents of a call, checked and brought to the size of the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from fastsd.components import Components
from fastsd.errors import FastsdError, about
from fastsd.generate.beside import check_beside
from fastsd.generate.control import Control, check_controls, fit_controls
from fastsd.generate.latents import InpaintMask
from fastsd.image.files import BLACK, WHITE, flatten
from fastsd.model.taesd import DECODES_ONLY
from fastsd.parameters import MAX_SIDE, PARAMETERS, Settings

MAX_GROWTH = 2.25  # times the pixels of the training resolution, without a note


@dataclass(frozen=True)
class Images:
    """The images of a call at the size of the result, `(width, height)`, and notes on what was changed."""

    image: Image.Image | None
    mask: InpaintMask | None
    depth: Image.Image | None
    controls: tuple[Control, ...]
    size: tuple[int, int]
    notes: list[str]


def check_prompts(argument: str, value: Any) -> list[str]:
    """One prompt or a list of them, as a list."""
    prompts = [value] if isinstance(value, str) else value
    if not isinstance(prompts, list | tuple) or not prompts or not all(isinstance(text, str) for text in prompts):
        raise FastsdError("it should be a text or a list of texts", argument=argument, value=value)
    return list(prompts)


def check_side(argument: str, value: Any, factor: int) -> int:
    """A width or height: a multiple of `factor` within range; the error names the nearest ones."""
    value = PARAMETERS[argument].check(value)
    if value % factor or value < factor:
        below = max(value // factor * factor, factor)
        raise FastsdError(
            f"it should be a multiple of {factor}: {below} or {below + factor}", argument=argument, value=value
        )
    return value


def fit_images(components: Components, settings: Settings, default: tuple[int, int]) -> Images:
    """All images of a call at one size: the size asked for, else the image's own, the depth map's, the first control's.

    Args:
        default: the size without any image.

    Raises:
        FastsdError: one of them is no image, or does not go with the checkpoint or the others.
    """
    config = components.vae.config
    notes: list[str] = []
    image, mask, controls = settings.image, None, check_controls(settings.controls)
    depth = check_beside(components, settings)
    width, height = settings.width, settings.height
    if image is not None:
        if components.vae.encoder is None:
            raise FastsdError(DECODES_ONLY, argument="image")
        image, notes = fit_image(image, width, height, config.downscale)
        width, height = image.size
    elif depth is not None and width is None and height is None:
        width, height = own_size("depth_image", depth, config.downscale)
    elif controls and width is None and height is None:
        width, height = own_size("controls[0].image", controls[0].image, config.downscale)
    if settings.mask_image is not None:
        assert image is not None  # `check_call` has seen to it
        fitted, more = fit_mask(settings.mask_image, image)
        mask = InpaintMask.from_image(fitted, config.downscale)
        notes += more
    if components.unet.config.reads == "mask" and mask is None:
        raise FastsdError("this is an inpainting checkpoint: give {image} and {mask_image}")
    width = check_side("width", default[0] if width is None else width, config.downscale)
    height = check_side("height", default[1] if height is None else height, config.downscale)
    fitted_controls, more = fit_controls(controls, components, width, height)
    notes += more
    trained = components.sample_size * config.downscale
    if width * height > MAX_GROWTH * trained**2:
        notes.append(f"the model was trained at {trained}x{trained}; at {width}x{height} it may repeat or tear objects")
    return Images(image, mask, depth, fitted_controls, (width, height), notes)


def fit_image(image: Any, width: int | None, height: int | None, factor: int) -> tuple[Image.Image, list[str]]:
    """The image to start from, as RGB at the size of the result.

    Without a width and height the size is the image's own, rounded down to multiples of `factor`.

    Returns:
        The image, and notes on what was changed.
    """
    if width is None or height is None:
        own = own_size("image", image, factor)
        width, height = own[0] if width is None else width, own[1] if height is None else height
    size = check_side("width", width, factor), check_side("height", height, factor)
    return _fit(image, "image", "RGB", WHITE, size, Image.Resampling.LANCZOS)


def fit_mask(mask: Any, image: Image.Image) -> tuple[Image.Image, list[str]]:
    """The mask as one channel at the size of the image, and notes on what was changed."""
    return _fit(mask, "mask_image", "L", BLACK, image.size, Image.Resampling.NEAREST)


def _fit(
    image: Any, argument: str, mode: str, background: int, size: tuple[int, int], resample: Image.Resampling
) -> tuple[Image.Image, list[str]]:
    with about(argument):
        if not isinstance(image, Image.Image):
            raise FastsdError(f"should be a PIL image, not {type(image).__name__}")
        image = flatten(image, mode, background)
    if image.size == size:
        return image, []
    what = argument.removesuffix("_image")
    note = f"the {what} was resized from {image.width}x{image.height} to {size[0]}x{size[1]}"
    return image.resize(size, resample), [note]


def own_size(argument: str, image: Any, factor: int) -> tuple[int, int]:
    """An image's width and height, rounded down to multiples of `factor`."""
    with about(argument):
        if not isinstance(image, Image.Image):
            raise FastsdError(f"should be a PIL image, not {type(image).__name__}")
        if max(image.size) > MAX_SIDE:
            raise FastsdError(
                f"{image.width}x{image.height} pixels; at most {MAX_SIDE} a side are generated: give {{width}} and "
                "{height}"
            )
    width, height = (max(n // factor * factor, factor) for n in image.size)
    return width, height


def fit_latents(latents: Any, shape: Sequence[int]) -> torch.Tensor:
    """Starting noise of the right shape `[N, C, h, w]`, as fp32 on the CPU."""
    if not isinstance(latents, torch.Tensor) or tuple(latents.shape) != tuple(shape):
        found = list(latents.shape) if isinstance(latents, torch.Tensor) else type(latents).__name__
        raise FastsdError(f"a tensor of shape {list(shape)} is needed, not {found}", argument="latents")
    if not bool(torch.isfinite(latents).all()):
        raise FastsdError("it holds NaN or infinite values", argument="latents")
    return latents.float().cpu()
