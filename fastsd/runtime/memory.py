"""Whether a model, and a picture of a given size, fit into memory; asked before the work, not after it."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fastsd.config import AutoencoderConfig, UNetConfig
from fastsd.errors import FastsdError
from fastsd.model.tiling import TILE
from fastsd.runtime.devices import dtype_name

GIB = 2**30


def available(device: torch.device) -> int | None:
    """Bytes that can still be taken on `device`, or None where the system does not say.

    What PyTorch keeps of a GPU's memory after earlier work, to use it again, can be taken too.
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
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
        advice = f"{{dtype}} {half} would fit ({numbers * 2 / GIB:.1f} GiB)"
    raise FastsdError(
        f"the weights take {numbers * dtype.itemsize / GIB:.1f} GiB in {dtype_name(dtype)}, "
        f"{free / GIB:.1f} GiB are free on {device}; {advice}",
        path=source,
    )


@dataclass(frozen=True)
class Picture:
    """What the memory that a batch of pictures takes depends on."""

    unet: UNetConfig
    vae: AutoencoderConfig
    width: int
    height: int
    batch: int
    dtype: torch.dtype
    tiled: bool

    @property
    def size(self) -> int:
        """Bytes of activations at the widest point of a run: a rough upper bound.

        The decoder, one picture at a time, holds about four maps of its second widest level at full size (a tile's);
        the UNet with guidance holds its skip connections and a feed-forward eight times as wide as the tokens.
        """
        tile = TILE * self.vae.downscale
        width, height = (min(n, tile) if self.tiled else n for n in (self.width, self.height))
        decoder = 4 * width * height * max(self.vae.block_out_channels[:2])
        tokens = (self.width // self.vae.downscale) * (self.height // self.vae.downscale)
        denoiser = 2 * self.batch * tokens * self.unet.block_out_channels[0] * 24
        return (decoder + denoiser) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.width}x{self.height} in batches of {self.batch}"


def check_picture(picture: Picture, device: torch.device) -> None:
    """Refuse a size and batch that cannot fit, and name what would.

    Raises:
        FastsdError: it names what fits: a batch, tiles, a dtype, a size.
    """
    free = available(device)
    if free is not None and picture.size > free:
        raise FastsdError(f"{picture} does not fit into {free / GIB:.1f} GiB; {what_fits(picture, free)}")


def too_large(picture: Picture) -> FastsdError:
    """What to raise when memory ran out although `check_picture` had no objection."""
    return FastsdError(f"not enough memory for {picture}; {what_fits(picture, picture.size - 1, 'would take less')}")


def what_fits(picture: Picture, free: int, praise: str = "would fit") -> str:
    """The changes that make a picture fit into `free` bytes: each that does alone, or else all of them together."""
    offers = []
    batch = picture.batch
    while batch > 1 and replace(picture, batch=batch).size > free:
        batch //= 2
    small = smaller(picture, free)
    half = replace(picture, dtype=torch.float16) if picture.dtype == torch.float32 else picture
    if replace(picture, batch=batch).size <= free:
        offers.append(f"{{batch_size}} {batch}")
    if not picture.tiled and replace(picture, tiled=True).size <= free:
        offers.append("{vae_tiling}")
    if half.size <= free:
        offers.append("{dtype} fp16 or bf16")
    if small is not None:
        offers.append(f"{small.width}x{small.height}")
    if not offers:
        small = smaller(replace(half, batch=1, tiled=True), free)
        if small is None:
            return "no size fits; close other programs"
        return f"{small.width}x{small.height} with {{batch_size}} 1, {{vae_tiling}} and {{dtype}} fp16 or bf16 {praise}"
    return f"{' or '.join(offers)} {praise}"


def smaller(picture: Picture, free: int) -> Picture | None:
    """The picture with its sides halved until it fits, or None."""
    factor = picture.vae.downscale
    while picture.size > free:
        if min(picture.width, picture.height) < 2 * factor:
            return None
        width, height = (n // 2 // factor * factor for n in (picture.width, picture.height))
        picture = replace(picture, width=width, height=height)
    return picture
