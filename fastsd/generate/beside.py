"""What a UNet reads beside the latent, other than a mask: the image to edit (InstructPix2Pix), a depth map (SD 2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastsd.components import Components
from fastsd.config import SD_VAE, SDXL_VAE
from fastsd.errors import FastsdError, about
from fastsd.generate.latents import Codec, image_tensor, to_channels_last
from fastsd.generate.sizes import check_image
from fastsd.image.files import as_depth, load
from fastsd.model.taesd import TAESD
from fastsd.parameters import Settings

IMAGE_GUIDANCE = 1.5  # as in diffusers and A1111


def fill_editing(settings: Settings, components: Components, given: Mapping[str, Any]) -> tuple[Settings, list[str]]:
    """The strength and the image's guidance of a model that edits; and notes on what has no effect.

    Args:
        settings: of the call.
        components: the checkpoint.
        given: the arguments that the caller gave. An image that is edited starts from noise alone unless a strength is
            given, since the network reads the image in every step.
    """
    scale = settings.image_guidance_scale
    if components.unet.config.reads != "image":
        if scale is None:
            return settings, []
        note = "the image guidance has no effect: the model reads no image in each step, as InstructPix2Pix does"
        return settings.replace(image_guidance_scale=None), [note]
    if given.get("strength") is None:
        settings = settings.replace(strength=1.0)
    return settings.replace(image_guidance_scale=IMAGE_GUIDANCE if scale is None else scale), []


def check_beside(components: Components, settings: Settings) -> Image.Image | None:
    """The depth map, as floating-point pixels of any size, or None.

    Raises:
        FastsdError: an image that the model needs is missing, or one that it does not read is given.
    """
    reads, depth = components.unet.config.reads, settings.depth_image
    if reads == "image" and settings.image is None:
        raise FastsdError("this model edits an image: give {image}")
    if reads == "depth" and depth is None:
        raise FastsdError(
            "this model reads a depth map, an image that is white where things are near: give {depth_image}"
        )
    if depth is None:
        return None
    with about("depth_image"):
        if reads != "depth":
            raise FastsdError("the model reads no depth map; a ControlNet for depth can take it with {controls}")
        check_image(depth)
        load(depth)
        depth = as_depth(depth)
        values = np.asarray(depth)
        if not np.isfinite(values).all() or values.min() == values.max():
            raise FastsdError("it holds one depth everywhere, or none; a depth map has near and far parts")
        return depth


def depth_latent(depth: Image.Image, height: int, width: int) -> torch.Tensor:
    """A depth map in [-1, 1] at the latent's size, `[1, height, width, 1]` fp32.

    Bicubic without antialiasing, then stretched to the range, as diffusers' StableDiffusionDepth2ImgPipeline does with
    a given map.
    """
    pixels = torch.from_numpy(np.array(depth, dtype=np.float32))[None, None]
    resized = torch.nn.functional.interpolate(pixels, size=(height, width), mode="bicubic", align_corners=False)
    low, high = resized.amin(), resized.amax()
    return to_channels_last(2.0 * (resized - low) / (high - low) - 1.0)


def edited_latent(codec: Codec, image: Image.Image, tiled: bool, components: Components) -> torch.Tensor:
    """The image to edit as the UNet reads it, `[1, h, w, C]` fp32: the mode of its latents, scaled only in CosXL.

    TAESD's latents are scaled already, so the scale of the family's own autoencoder is taken off.
    """
    mode = codec.mode(image_tensor(image), tiled)
    if not components.scaled_image and not isinstance(codec.vae, TAESD):
        return mode
    scaled = codec.scale(mode)
    return scaled if components.scaled_image else scaled / (SDXL_VAE if components.xl else SD_VAE).scaling_factor
