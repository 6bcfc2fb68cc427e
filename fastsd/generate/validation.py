"""One argument of a call at a time: checked, and brought into the form that a request holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from fastsd.components import Components
from fastsd.errors import FastsdError
from fastsd.image.files import BLACK, WHITE, flatten
from fastsd.model.controlnet import ControlNet
from fastsd.model.taesd import DECODES_ONLY
from fastsd.runtime.devices import dtype_name
from fastsd.sampling.table import Table

MAX_SIDE = 8192
MAX_CONTROL_WEIGHT = 10.0
MAX_GROWTH = 2.25  # times the pixels of the training, without a note


@dataclass(frozen=True)
class Control:
    """A picture that steers the drawing through a ControlNet.

    Attributes:
        net: from `Pipeline.load_controlnet`.
        image: edges, depths, a pose: whatever the ControlNet was trained to read; scaled to the size of the result.
        weight: multiplies what the ControlNet adds; 0 is without it.
        start, end: the part of the steps in which it takes part, shares from 0 to 1.
    """

    net: ControlNet
    image: Image.Image
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0

    def active(self, table: Table) -> frozenset[int]:
        """The rows of the table in which it takes part: of the steps that lie within its start and end."""
        steps = [int(step - table.step[0]) for step in table.step]
        count = max(steps, default=0) + 1
        within = {step for step in steps if step / count >= self.start and (step + 1) / count <= self.end}
        return frozenset(row for row, step in enumerate(steps) if self.weight and step in within)


def texts(name: str, value: Any) -> list[str]:
    """One prompt or a list of them, as a list."""
    prompts = [value] if isinstance(value, str) else value
    if not isinstance(prompts, list | tuple) or not prompts or not all(isinstance(p, str) for p in prompts):
        raise FastsdError(f"{name} should be a text or a list of texts, not {str(value)[:60]!r}")
    return list(prompts)


def word(name: str, value: Any) -> str:
    """`value` if it is a text."""
    if not isinstance(value, str):
        raise FastsdError(f"{name} should be a name, not {value!r}")
    return value


def number(name: str, value: Any, low: float, high: float, whole: bool = False) -> Any:
    """`value` if it is a number (a whole one) from `low` to `high`.

    Raises:
        FastsdError: it is not; the message names the argument and the range.
    """
    kind = "a whole number" if whole else "a number"
    good = isinstance(value, int) or (isinstance(value, float | np.floating) and not whole)
    if isinstance(value, np.integer):
        good, value = True, int(value)
    if isinstance(value, bool) or not good or not math.isfinite(value) or not low <= value <= high:
        raise FastsdError(f"{name} is {value!r}; it should be {kind} from {low:g} to {high:g}")
    return int(value) if whole else float(value)


def side(name: str, value: Any, factor: int) -> int:
    """A width or height: a multiple of `factor` in range; otherwise the nearest right ones are named."""
    value = number(name, value, factor, MAX_SIDE, whole=True)
    if value % factor:
        below = max(value // factor * factor, factor)
        raise FastsdError(f"{name} is {value}; it should be a multiple of {factor}: {below} or {below + factor}")
    return value


class Pictures(NamedTuple):
    """The pictures of a call at the size of the result, `(width, height)`, and notes on what was done to them."""

    image: Image.Image | None
    mask: Image.Image | None
    controls: tuple[Control, ...]
    size: tuple[int, int]
    notes: list[str]


def fit_pictures(
    components: Components,
    image: Any,
    mask: Any,
    controls: list[Control],
    width: int | None,
    height: int | None,
    default: tuple[int, int],
) -> Pictures:
    """All pictures of a call, at one size: the one asked for, else the starting picture's, else the first control's.

    Args:
        components: the checkpoint.
        image, mask: as the caller gave them, or None.
        controls: with their pictures as given.
        width, height: as asked for, or None.
        default: the size without any picture.

    Raises:
        FastsdError: one of them is none, or does not go with the checkpoint or the others.
    """
    config = components.vae.config
    notes: list[str] = []
    if image is not None:
        if components.vae.encoder is None:
            raise FastsdError(f"image: {DECODES_ONLY}")
        image, notes = fit_image(image, width, height, config.downscale)
        width, height = image.size
    elif controls and width is None and height is None:
        width, height = own_size(controls[0].image, config.downscale)
    if mask is not None:
        mask, more = fit_mask(mask, image)
        notes += more
    if components.unet.config.in_channels == 9 and mask is None:
        raise FastsdError("this is an inpainting checkpoint: give image and mask_image")
    width = side("width", default[0] if width is None else width, config.downscale)
    height = side("height", default[1] if height is None else height, config.downscale)
    fitted, more = fit_controls(controls, components, width, height)
    notes += more
    trained = components.sample_size * config.downscale
    if width * height > MAX_GROWTH * trained**2:
        notes.append(
            f"the model was trained at {trained}x{trained}; at {width}x{height} it may repeat or tear what it draws"
        )
    return Pictures(image, mask, fitted, (width, height), notes)


def fit_image(image: Any, width: int | None, height: int | None, factor: int) -> tuple[Image.Image, list[str]]:
    """The starting picture as RGB at the size of the result.

    Without a width and height the size is the picture's own, rounded down to multiples of `factor`.

    Returns:
        The picture, and notes on what was done to it.
    """
    if not isinstance(image, Image.Image):
        raise FastsdError(f"image should be a PIL image, not {type(image).__name__}")
    if (width is None or height is None) and max(image.size) > MAX_SIDE:
        raise FastsdError(
            f"image is {image.width}x{image.height}; at most {MAX_SIDE} pixels a side are drawn, so give a smaller one"
        )
    own = tuple(max(n // factor * factor, factor) for n in image.size)
    size = (
        side("width", own[0] if width is None else width, factor),
        side("height", own[1] if height is None else height, factor),
    )
    image = flatten(image, "RGB", WHITE, "image")
    if image.size == size:
        return image, []
    note = f"the image was resized from {image.width}x{image.height} to {size[0]}x{size[1]}"
    return image.resize(size, Image.Resampling.LANCZOS), [note]


def fit_mask(mask: Any, image: Image.Image | None) -> tuple[Image.Image, list[str]]:
    """The mask as one channel at the image's size: white is painted anew, black is kept."""
    if image is None:
        raise FastsdError("mask_image is given without image; a mask says which part of an image to paint anew")
    if not isinstance(mask, Image.Image):
        raise FastsdError(f"mask_image should be a PIL image, not {type(mask).__name__}")
    mask = flatten(mask, "L", BLACK, "mask_image")
    if mask.size == image.size:
        return mask, []
    note = f"the mask was resized from {mask.width}x{mask.height} to {image.width}x{image.height}"
    return mask.resize(image.size, Image.Resampling.NEAREST), [note]


def fit_latents(latents: Any, shape: tuple[int, int, int, int]) -> torch.Tensor:
    """Starting noise of the right shape `[N, C, h, w]`, as fp32 on the CPU."""
    if not isinstance(latents, torch.Tensor) or tuple(latents.shape) != shape:
        found = list(latents.shape) if isinstance(latents, torch.Tensor) else type(latents).__name__
        raise FastsdError(f"latents is {found}; it should be a tensor of shape {list(shape)}")
    if not bool(torch.isfinite(latents).all()):
        raise FastsdError("latents holds NaN or infinite values")
    return latents.float().cpu()


def listed(controls: Any) -> list[Control]:
    """The controls, if they are a list of them."""
    if not isinstance(controls, list | tuple) or not all(isinstance(one, Control) for one in controls):
        raise FastsdError("controls should be a list of fastsd.Control")
    return list(controls)


def fit_controls(
    controls: list[Control], components: Components, width: int, height: int
) -> tuple[tuple[Control, ...], list[str]]:
    """The controls with their pictures as RGB at the size of the result, and notes on what was done to them."""
    fitted, notes = [], []
    for k, control in enumerate(controls):
        name = f"controls[{k}]"
        if not isinstance(control.net, ControlNet):
            raise FastsdError(f"{name}.net should come from Pipeline.load_controlnet, not {type(control.net).__name__}")
        wanted, found = components.unet.config, control.net.config
        if (found.block_out_channels, found.cross_attention_dim) != (
            wanted.block_out_channels,
            wanted.cross_attention_dim,
        ):
            raise FastsdError(f"{name}.net was loaded for a model of another family")
        if control.net.downscale != components.vae.config.downscale:
            raise FastsdError(
                f"{name}.net shrinks its picture to 1/{control.net.downscale} and the model's autoencoder to "
                f"1/{components.vae.config.downscale}; they should be of one family"
            )
        own, model = control.net.conv_in.weight, components.unet.conv_in.weight
        if (own.dtype, own.device) != (model.dtype, model.device):
            raise FastsdError(
                f"{name}.net is {dtype_name(own.dtype)} on {own.device} and the model {dtype_name(model.dtype)} on "
                f"{model.device}; load it with this pipeline's load_controlnet"
            )
        if not isinstance(control.image, Image.Image):
            raise FastsdError(f"{name}.image should be a PIL image, not {type(control.image).__name__}")
        number(f"{name}.weight", control.weight, -MAX_CONTROL_WEIGHT, MAX_CONTROL_WEIGHT)
        start, end = (number(f"{name}.{part}", getattr(control, part), 0, 1) for part in ("start", "end"))
        if start > end:
            raise FastsdError(f"{name}.start is {start:g}, after its end {end:g}")
        if control.image.size != (width, height):
            was = f"{control.image.width}x{control.image.height}"
            notes.append(f"the control picture was resized from {was} to {width}x{height}")
        image = flatten(control.image, "RGB", WHITE, f"{name}.image")
        fitted.append(replace(control, image=resized(image, width, height)))
    return tuple(fitted), notes


def left_out(controls: Sequence[Control], table: Table) -> list[str]:
    """Notes on controls in whose part of the steps there is no whole one."""
    if not len(table):
        return []
    steps = int(table.step[-1] - table.step[0]) + 1
    return [
        f"control {k} takes part in no step: none of the {steps} lies within {control.start:g} and {control.end:g}"
        for k, control in enumerate(controls, start=1)
        if control.weight and not control.active(table)
    ]


def nothing_redone(what: str, strength: float, steps: int) -> str:
    """A note on a strength that leaves no step."""
    return f"{what} redoes nothing: strength {strength:g} of {steps} step{'s' * (steps > 1)} is less than one"


def own_size(image: Any, factor: int) -> tuple[int, int]:
    """A picture's width and height, rounded down to multiples of `factor`."""
    if not isinstance(image, Image.Image):
        raise FastsdError(f"the control's image should be a PIL image, not {type(image).__name__}")
    if max(image.size) > MAX_SIDE:
        raise FastsdError(
            f"the control's image is {image.width}x{image.height}; at most {MAX_SIDE} pixels a side are drawn, so give "
            "width and height"
        )
    width, height = (max(n // factor * factor, factor) for n in image.size)
    return width, height


def resized(image: Image.Image, width: int, height: int) -> Image.Image:
    """`image` at a size, by Lanczos."""
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.LANCZOS)
