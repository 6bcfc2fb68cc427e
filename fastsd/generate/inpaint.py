"""Inpainting and outpainting: a call's image and mask, brought to what is painted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from fastsd.errors import FastsdError
from fastsd.generate.canvas import Box, cut, enlarge_canvas, fill_from_around, surroundings
from fastsd.generate.like import LIKE
from fastsd.generate.masks import InpaintMask, Weights, blur_mask, mask_notes, scale_mask
from fastsd.generate.sizes import check_side, fit_image, read_image
from fastsd.image.files import BLACK, WHITE
from fastsd.parameters import Settings
from fastsd.parameters.kinds import MAX_SIDE


@dataclass(frozen=True)
class Inpainting:
    """What is painted.

    Attributes:
        image: RGB, what the run starts from, at the size at which it is painted.
        mask: of the whole image and of what is painted.
        notes: on what was changed.
    """

    image: Image.Image
    mask: InpaintMask
    notes: list[str]


def fit_inpainting(settings: Settings, factor: int, default: tuple[int, int]) -> Inpainting:
    """The image and the mask of a call that paints a part of an image or around it.

    Args:
        factor: pixels of a latent pixel's side.
        default: the checkpoint's own size, at which a masked part is painted alone.

    Raises:
        FastsdError: one of them is no image, or a size is out of range or contradicts the others.
    """
    original, weights, size, notes = _whole(settings, factor, default)
    filled = original
    if settings.inpaint_fill != "original":
        filled = fill_from_around(original, weights)
        if settings.strength == 1.0 and LIKE[settings.like].pure_noise_at_full:
            notes.append(f"the fill {settings.inpaint_fill} has no effect: at strength 1 nothing is left of it")
    box: Box = (0, 0, *original.size)
    if settings.inpaint_only_masked:
        box = surroundings(weights, settings.inpaint_padding, size)
    image = cut(filled, box)
    if image.size != size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    return Inpainting(image, InpaintMask.make(original, Image.fromarray(weights), box, size, factor), notes)


def _whole(
    settings: Settings, factor: int, default: tuple[int, int]
) -> tuple[Image.Image, Weights, tuple[int, int], list[str]]:
    """The whole image, its mask `[H, W]`, the width and height at which it is painted, and notes."""
    width, height = settings.width, settings.height
    if settings.outpaint or settings.inpaint_only_masked:
        original, notes = read_image(settings.image, "image", "RGB", WHITE)
    else:
        original, notes = fit_image(settings.image, width, height, factor)
    own = original.size
    inside: Box | None = None
    if settings.outpaint:
        original, inside, more = _enlarge(original, settings, factor)
        notes += more
    if settings.inpaint_only_masked:
        size = tuple(default[i] if side is None else side for i, side in enumerate((width, height)))
        size = check_side("width", size[0], factor), check_side("height", size[1], factor)
    else:
        size = original.size
    weights, why, more = _read_mask(settings, own)
    notes += more
    if inside is not None:
        new = np.full((original.height, original.width), 255, dtype=np.uint8)
        new[inside[1] : inside[3], inside[0] : inside[2]] = weights
        weights = new
    blurred = blur_mask(weights, settings.mask_blur)
    return original, blurred, size, notes + mask_notes(weights, blurred, settings.mask_blur, why)


def _enlarge(image: Image.Image, settings: Settings, factor: int) -> tuple[Image.Image, Box, list[str]]:
    """The canvas of outpainting, the image's box in it, and notes."""
    left, top, right, bottom = map(int, settings.outpaint.split(","))
    canvas_size = image.width + left + right, image.height + top + bottom
    if max(canvas_size) + factor > MAX_SIDE:
        raise FastsdError(
            f"it makes {canvas_size[0]}x{canvas_size[1]}; less than {MAX_SIDE} pixels a side are painted",
            argument="outpaint",
            value=settings.outpaint,
        )
    canvas, box, became = enlarge_canvas(image, (left, top, right, bottom), factor)
    notes = []
    if became != (left, top, right, bottom):
        notes.append(
            f"the canvas is {canvas.width}x{canvas.height}, multiples of {factor}: {','.join(map(str, became))} pixels "
            "were added"
        )
    for name, given, side in zip(("width", "height"), (settings.width, settings.height), canvas.size, strict=True):
        if given not in (None, side) and not settings.inpaint_only_masked:
            raise FastsdError(
                f"{{outpaint}} makes the image {canvas.width}x{canvas.height}; leave {{{name}}} out",
                argument=name,
                value=given,
            )
    return canvas, box, notes


def _read_mask(settings: Settings, size: tuple[int, int]) -> tuple[Weights, list[str], list[str]]:
    """The mask `[H, W]` of an image of this size without its blur, what was done to it, and notes."""
    given: Any = settings.mask_image
    if given is None:
        if settings.mask_invert:
            raise FastsdError("given without {mask_image}, the mask to invert", argument="mask_invert")
        return np.zeros(size[::-1], dtype=np.uint8), [], []
    mask, notes = read_image(given, "mask_image", "L", BLACK)
    values, why = np.asarray(mask), []
    if settings.mask_invert:
        values, why = 255 - values, ["inverted"]
    if mask.size != size:
        notes.append(f"the mask was resized from {mask.width}x{mask.height} to {size[0]}x{size[1]}")
    return scale_mask(values, size), why, notes
