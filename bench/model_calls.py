"""The models and the sampler's step, called on tensors that have shapes but no memory: what `bench.warm` traces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from fastsd import config
from fastsd.kernels import advance
from fastsd.model.clip import TextEncoder
from fastsd.model.fp8 import quantize_unet
from fastsd.model.unet import AddedConditioning, UNet
from fastsd.model.vae import AutoencoderKL

UNETS = [  # sides of the latent; blocks of keys divide those of the first, not all of those of the second
    ("SD1.5", config.SD15_UNET, ((64, 64), (65, 65))),
    ("SD2.1", config.SD21_UNET, ((96, 96), (64, 65))),
    ("SDXL", config.SDXL_UNET, ((128, 128), (104, 152))),
]
ENCODERS = {"CLIP": config.CLIP_L, "OpenCLIP H": config.OPENCLIP_H, "OpenCLIP bigG": config.OPENCLIP_BIGG}

Calls = Iterator[tuple[str, Callable[[], Any]]]


class ChannelsLast(TorchFunctionMode):
    """Inside this context convolutions answer as on CUDA, where their weights' channels come last."""

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = func(*args, **(kwargs or {}))
        return y.contiguous(memory_format=torch.channels_last) if func in (torch.conv2d, F.interpolate) else y


def empty(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def built(kind: Callable[..., nn.Module], settings: Any, dtype: torch.dtype = torch.float16) -> Any:
    with torch.device("meta"):
        return kind(settings).to(dtype).to(memory_format=torch.channels_last).eval()


def unets(fp8: bool = False) -> Calls:
    """Each UNet's name and calls of it; `fp8`: with the products and convolutions that `--dtype fp8` computes so."""
    for name, settings, sizes in UNETS:
        unet, time = built(UNet, settings), empty(2, dtype=torch.float32)
        if fp8:
            quantize_unet(unet)
        added = AddedConditioning(empty(2, 1280), empty(2, 6)) if settings.addition_time_embed_dim else None
        for size in sizes:
            inputs = empty(2, *size, 4), time, empty(2, 77, settings.cross_attention_dim), added
            title = f"{name}{' fp8' if fp8 else ''} {size[0]}x{size[1]}"
            yield title, lambda unet=unet, inputs=inputs: unet(*inputs)


def encoders() -> Calls:
    """Each text encoder's and autoencoder's name and a call of it."""
    for name, settings in ENCODERS.items():
        encoder = built(TextEncoder, settings)
        yield name, lambda encoder=encoder: encoder(empty(1, 77, dtype=torch.int64))
    for dtype, side in ((torch.float16, 64), (torch.float16, 128), (torch.bfloat16, 128), (torch.float32, 128)):
        vae, like = built(AutoencoderKL, config.SD_VAE, dtype), {"dtype": dtype}
        latent, image = empty(1, side, side, 4, **like), empty(1, 8 * side, 8 * side, 3, **like)
        name = f"VAE {str(dtype)[6:]} {side}x{side}"
        yield name + " decode", lambda vae=vae, latent=latent: vae.decode(latent)
        yield name + " encode", lambda vae=vae, image=image: vae.encode(image)


def steps() -> Calls:
    """The sampler's step without guidance, and with each way of giving it."""
    number, wide = empty(1, dtype=torch.int64), {"dtype": torch.float32}
    shape = (1, 64, 64, 4)
    for batch, guidance in ((1, 1.0), (2, 7.5), (2, empty(1, **wide))):
        for rescale in (None, empty(1, **wide)):
            buffers = empty(*shape, **wide), empty(*shape), empty(batch, *shape[1:]), empty(31, 16, **wide), number
            rest = empty(*shape, **wide), empty(3, *shape, **wide), empty(2, *shape, **wide), guidance, rescale
            yield "step", lambda given=(*buffers, *rest): advance.advance(*given)
    for guidance in (7.5, empty(1, **wide)):  # of a text and an image
        buffers = empty(*shape, **wide), empty(*shape), empty(3, *shape[1:]), empty(31, 16, **wide), number
        rest = empty(*shape, **wide), empty(3, *shape, **wide), empty(2, *shape, **wide), guidance, None, guidance
        yield "step", lambda given=(*buffers, *rest): advance.advance(*given)
