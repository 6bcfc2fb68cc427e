"""Whether a model, and a picture of a given size, fit into memory; asked before the work, not after it."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from fastsd.config import UNetConfig, VAEConfig
from fastsd.devices import dtype_name
from fastsd.errors import FastsdError

GIB = 2**30


def available(device: torch.device) -> int | None:
    """Bytes that can still be taken on `device`, or None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        try:
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (ValueError, OSError, AttributeError):
            return None


def check_weights(source: Path, numbers: int, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse a model whose weights cannot fit, and name a precision in which they would.

    Args:
        source: the model, for the message.
        numbers: how many its weights are.
        dtype, device: as they will be loaded.

    Raises:
        FastsdError: it says how much is needed and how much is there.
    """
    free = available(device)
    if free is None or numbers * dtype.itemsize <= free:
        return
    advice = "close other programs or take a smaller model"
    if dtype.itemsize > 2 and numbers * 2 <= free:
        half = "fp16" if device.type == "cuda" else "bf16"
        advice = f"dtype {half} would fit ({numbers * 2 / GIB:.1f} GiB)"
    raise FastsdError(
        f"{source}: the weights take {numbers * dtype.itemsize / GIB:.1f} GiB in {dtype_name(dtype)}, "
        f"{free / GIB:.1f} GiB are free on {device}; {advice}"
    )


def picture_size(unet: UNetConfig, vae: VAEConfig, width: int, height: int, batch: int, itemsize: int) -> int:
    """Bytes of activations at the widest point of a run: a rough upper bound.

    The decoder holds about four maps of its second widest level at full size; the UNet with guidance holds its skip
    connections and a feed-forward eight times as wide as the tokens.
    """
    decoder = 4 * width * height * max(vae.block_out_channels[:2])
    tokens = (width // vae.downscale) * (height // vae.downscale)
    denoiser = 2 * batch * tokens * unet.block_out_channels[0] * 24
    return (decoder + denoiser) * itemsize


def check_picture(
    unet: UNetConfig, vae: VAEConfig, width: int, height: int, batch: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Refuse a size and batch that cannot fit, and name what would.

    Raises:
        FastsdError: it names a batch or a size that fits.
    """
    free = available(device)
    if free is None or picture_size(unet, vae, width, height, batch, dtype.itemsize) <= free:
        return
    fitting = batch
    while fitting > 1 and picture_size(unet, vae, width, height, fitting, dtype.itemsize) > free:
        fitting //= 2
    if picture_size(unet, vae, width, height, fitting, dtype.itemsize) <= free:
        advice = f"batch_size {fitting} would fit"
    else:
        side = width
        while side > vae.downscale and picture_size(unet, vae, side, side, 1, dtype.itemsize) > free:
            side = side // 2 // vae.downscale * vae.downscale
        advice = f"{side}x{side} would fit, or vae_tiling"
    raise FastsdError(f"{width}x{height} in batches of {batch} does not fit into {free / GIB:.1f} GiB; {advice}")
