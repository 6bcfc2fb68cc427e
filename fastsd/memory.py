"""Whether a model, and a picture of a given size, fit into memory; asked before the work, not after it."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from fastsd.config import UNetConfig, VAEConfig
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


def weights_size(folder: Path) -> int:
    """Bytes of the components' weight files, one variant of each; or of the one file that is the checkpoint."""
    if folder.is_file():
        return folder.stat().st_size
    total = 0
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        files = [path for path in (folder / part).glob("*.safetensors") if path.is_file()]
        half = [path for path in files if ".fp16" in path.name]
        whole = [path for path in files if ".fp16" not in path.name]
        total += sum(path.stat().st_size for path in whole or half)
    return total


def check_weights(folder: Path, device: torch.device) -> None:
    """Refuse a model whose weights cannot fit even at half the size of their files.

    Raises:
        FastsdError: it says how much is needed and how much is there.
    """
    free = available(device)
    needed = weights_size(folder) // 2
    if free is not None and needed > free:
        raise FastsdError(
            f"{folder}: the weights need at least {needed / GIB:.1f} GiB, {free / GIB:.1f} GiB are free on {device}; "
            "close other programs or take a smaller model"
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
