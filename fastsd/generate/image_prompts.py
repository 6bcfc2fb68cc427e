"""Image prompts in a call: images that every cross-attention reads beside the text, through an IP-Adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from fastsd.components import Components
from fastsd.errors import FastsdError, about, named_arguments
from fastsd.generate.sizes import read_image
from fastsd.image.clip_input import clip_input
from fastsd.image.files import WHITE
from fastsd.model.ip_adapter import IPAdapter
from fastsd.model.layers import CrossAttention
from fastsd.model.unet import UNet
from fastsd.parameters.kinds import Number
from fastsd.parameters.rows import MAX_IMAGE_PROMPT_SCALE
from fastsd.runtime.devices import dtype_name

SCALE = Number(low=-MAX_IMAGE_PROMPT_SCALE, high=MAX_IMAGE_PROMPT_SCALE)
MAX_IMAGES = 16  # of one prompt

KeyValues = tuple[torch.Tensor, ...]  # of every cross-attention, in order of use


@named_arguments
@dataclass(frozen=True)
class ImagePrompt:
    """Images that say what to generate, beside the text.

    Attributes:
        adapter: from `Pipeline.load_ip_adapter`.
        images: one, or a list whose images are read together.
        scale: multiplies what the adapter adds; 0 turns it off.
        mask: an image, white where the adapter adds; None: everywhere.
    """

    adapter: IPAdapter
    images: Any
    scale: float = 1.0
    mask: Image.Image | None = None


@dataclass(eq=False)
class FittedPrompt:
    """An image prompt, checked, with what the UNet reads of it, which is computed once a call.

    Attributes:
        pixels: as the vision tower reads them, `[images, size, size, 3]`.
        mask: of pixels that are 0 or 1, or None.
    """

    adapter: IPAdapter
    pixels: torch.Tensor
    scale: float
    mask: Image.Image | None = None
    _projected: tuple[KeyValues, KeyValues] | None = field(default=None, repr=False)

    def key_values(self, negative: bool) -> KeyValues:
        """Keys and values of every cross-attention, `[1, tokens, 2, heads, D]` each.

        negative: of the unconditional sample, which reads no image. The values carry the scale, since attention is
        linear in them.
        """
        if self._projected is None:
            weight = self.adapter.weight
            both = self.adapter.project(self.pixels.to(weight.device, weight.dtype))
            scale = torch.tensor([1.0, self.scale], dtype=torch.float32, device="cpu").view(2, 1, 1)
            scaled = [tuple(kv * scale.to(kv) for kv in each) for each in both]
            self._projected = scaled[0], scaled[1]
        return self._projected[0 if negative else 1]

    def masks(self, unet: UNet, height: int, width: int) -> KeyValues:
        """The mask at the size of each cross-attention's map, `[1, tokens, 1]`; nothing without a mask.

        height, width: of the latent. As in diffusers: 0 or 1, brought to the map by bicubic interpolation.
        """
        if self.mask is None:
            return ()
        weight = unet.conv_in.weight
        full = torch.from_numpy((np.asarray(self.mask) >= 128).astype(np.float32))[None, None]
        sizes = [(height, width)]
        for _ in range(len(unet.config.block_out_channels) - 1):
            sizes.append(((sizes[-1][0] + 1) // 2, (sizes[-1][1] + 1) // 2))
        levels = [F.interpolate(full, size=size, mode="bicubic").to(weight).view(1, -1, 1) for size in sizes]
        return tuple(levels[level] for level in levels_of(unet))


def levels_of(unet: UNet) -> list[int]:
    """The level of each cross-attention in order of use, 0 the one of the latent's size."""
    last, found = len(unet.config.block_out_channels) - 1, []
    for name, module in unet.named_modules():
        if isinstance(module, CrossAttention):
            where, number = (*name.split("."), "")[:2]
            found.append(
                last if where == "mid_block" else int(number) if where == "down_blocks" else last - int(number)
            )
    return found


def check_image_prompts(prompts: Any) -> list[ImagePrompt]:
    """`image_prompts` as a list of them, or a FastsdError."""
    if not isinstance(prompts, list | tuple) or not all(isinstance(one, ImagePrompt) for one in prompts):
        raise FastsdError("should be a list of fastsd.ImagePrompt", argument="image_prompts")
    return list(prompts)


def fit_image_prompts(
    prompts: Sequence[ImagePrompt], components: Components, size: tuple[int, int]
) -> tuple[tuple[FittedPrompt, ...], list[str]]:
    """The image prompts as the networks read them, and notes. A scale of 0 leaves one out.

    size: of the result, to which masks are resized.

    Raises:
        FastsdError: an adapter of another family or pipeline, an image that is none, a scale out of range.
    """
    fitted, notes = [], list[str]()
    for k, one in enumerate(prompts):
        name = f"image_prompts[{k}]"
        with about(f"{name}.adapter"):
            _check_adapter(one.adapter, components)
        with about(f"{name}.scale"):
            scale = SCALE.check(one.scale)
        images = list(one.images) if isinstance(one.images, list | tuple) else [one.images]
        if not 1 <= len(images) <= MAX_IMAGES:
            raise FastsdError(f"{len(images)} images; 1 to {MAX_IMAGES} are read", argument=f"{name}.images")
        assert one.adapter.encoder is not None
        side, read = one.adapter.encoder.config.image_size, []
        for image in images:
            rgb, more = read_image(image, f"{name}.images", "RGB", WHITE)
            notes += more
            read.append(clip_input(rgb, side))
        own_mask = None
        if one.mask is not None:
            own_mask, more = read_image(one.mask, f"{name}.mask", "L", WHITE)
            notes += more
            own_mask = own_mask if own_mask.size == size else own_mask.resize(size, Image.Resampling.LANCZOS)
        if scale:
            fitted.append(FittedPrompt(one.adapter, torch.cat(read), float(scale), own_mask))
    return tuple(fitted), notes


def _check_adapter(adapter: Any, components: Components) -> None:
    """Refuse an adapter that cannot steer this checkpoint's UNet."""
    if not isinstance(adapter, IPAdapter):
        raise FastsdError(f"should come from Pipeline.load_ip_adapter, not {type(adapter).__name__}")
    layers = [module for module in components.unet.modules() if isinstance(module, CrossAttention)]
    widths = tuple(layer.to_q.weight.shape[0] for layer in layers)
    if (adapter.config.widths, adapter.config.text_features) != (widths, components.unet.config.cross_attention_dim):
        raise FastsdError("it was loaded for a model of another family")
    own, model = adapter.weight, components.unet.conv_in.weight
    if (own.dtype, own.device) != (model.dtype, model.device):
        raise FastsdError(
            f"it is {dtype_name(own.dtype)} on {own.device} and the model {dtype_name(model.dtype)} on {model.device}; "
            "load it with this pipeline's load_ip_adapter"
        )
