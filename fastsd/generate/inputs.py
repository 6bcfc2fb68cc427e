"""The images and latents of a call, checked and brought to the size of the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from fastsd.components import Components
from fastsd.errors import FastsdError
from fastsd.generate.beside import check_beside
from fastsd.generate.control import Control, check_controls, fit_controls
from fastsd.generate.image_prompts import FittedPrompt, check_image_prompts, fit_image_prompts
from fastsd.generate.inpaint import fit_inpainting
from fastsd.generate.masks import InpaintMask
from fastsd.generate.sizes import check_side, fit_image, own_size
from fastsd.model.taesd import DECODES_ONLY
from fastsd.parameters import Settings, not_stored

MAX_GROWTH = 2.25  # times the pixels of the training resolution, without a note


@dataclass(frozen=True)
class Images:
    """The images of a call at the size of the result, `(width, height)`, and notes on what was changed."""

    image: Image.Image | None
    mask: InpaintMask | None
    depth: Image.Image | None
    controls: tuple[Control, ...]
    image_prompts: tuple[FittedPrompt, ...]
    size: tuple[int, int]
    notes: list[str]


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
        if settings.mask_image is not None or settings.outpaint is not None:
            inpainting = fit_inpainting(settings, config.downscale, default)
            image, mask, notes = inpainting.image, inpainting.mask, inpainting.notes
        else:
            image, notes = fit_image(image, width, height, config.downscale)
        width, height = image.size
    elif depth is not None and width is None and height is None:
        width, height = own_size("depth_image", depth, config.downscale)
    elif controls and width is None and height is None:
        width, height = own_size("controls[0].image", controls[0].image, config.downscale)
    if components.unet.config.reads == "mask" and mask is None:
        raise FastsdError("this is an inpainting checkpoint: give {image} and {mask_image}, or {outpaint}")
    width = check_side("width", default[0] if width is None else width, config.downscale)
    height = check_side("height", default[1] if height is None else height, config.downscale)
    fitted_controls, more = fit_controls(controls, components, (width, height), mask)
    notes += more
    prompts, more = fit_image_prompts(check_image_prompts(settings.image_prompts), components, (width, height))
    notes += more
    trained = components.sample_size * config.downscale
    if width * height > MAX_GROWTH * trained**2:
        notes.append(f"the model was trained at {trained}x{trained}; at {width}x{height} it may repeat or tear objects")
    return Images(image, mask, depth, fitted_controls, prompts, (width, height), notes)


def fit_latents(latents: Any, shape: Sequence[int]) -> torch.Tensor:
    """Starting noise of the right shape `[N, C, h, w]`, as fp32 on the CPU."""
    if not isinstance(latents, torch.Tensor) or tuple(latents.shape) != tuple(shape):
        found = list(latents.shape) if isinstance(latents, torch.Tensor) else type(latents).__name__
        raise FastsdError(f"a tensor of shape {list(shape)} is needed, not {found}", argument="latents")
    if latents.is_complex():
        raise FastsdError("it should hold real numbers", argument="latents")
    if not bool(torch.isfinite(latents).all()):
        raise FastsdError("it holds NaN or infinite values", argument="latents")
    return latents.float().cpu()


def fit_generators(settings: Settings, count: int) -> dict[str, Any]:
    """The settings that a caller's generators stand for: a list with one for each image, or one that draws for all, as
    in diffusers.

    Raises:
        FastsdError: something else, or with another source of noise.
    """
    given = settings.generator
    alone = isinstance(given, torch.Generator)
    found = [given] if alone else given
    whole = isinstance(found, list | tuple) and all(isinstance(one, torch.Generator) for one in found)
    if not whole or not (alone or len(found) == count):
        raise FastsdError(
            f"it should be a torch.Generator, or a list of {count}, one for each image", argument="generator"
        )
    if settings.noise not in ("cpu", "batch"):
        raise FastsdError(
            f"given with noise {settings.noise}, which has generators of its own: give a seed", argument="generator"
        )
    noise = "batch" if len(found) == 1 and count > 1 else "cpu"
    return {"generator": list(found), "noise": noise, "seed": found[0].initial_seed()}


def moved_generators(settings: Settings) -> list[str]:
    """A note where a generator stands elsewhere than at its seed, so that the seed does not repeat the image."""
    for one in settings.generator or ():
        if not torch.equal(one.get_state(), torch.Generator(one.device).manual_seed(one.initial_seed()).get_state()):
            return ["a generator had drawn before the call: its seed alone does not repeat the image"]
    return []


def size_notes(components: Components, settings: Settings) -> list[str]:
    """Notes on the sizes that SDXL reads, which other models do not read and no image stores."""
    names = ("original_size", "crops_coords_top_left", "target_size")
    given = [name for name in (*names, *(f"negative_{name}" for name in names)) if settings[name] is not None]
    if components.xl:
        return not_stored(given)
    return [f"{name} has no effect: only models of SDXL's family read it" for name in given]
