"""Whether a model, and images of a given size, fit into memory; checked before the work."""

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
    """Bytes that are free on `device`, or None where the system does not say.

    GPU memory that PyTorch has cached for reuse counts as free.
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


def check_weights(source: Path, count: int, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse a model whose weights do not fit, and name a precision in which they would.

    Args:
        source: the model, for the message.
        count: its parameters.
        dtype, device: of the loaded weights.

    Raises:
        FastsdError: it says how much is needed and how much is free.
    """
    free = available(device)
    if free is None or count * dtype.itemsize <= free:
        return
    advice = "close other programs or take a smaller model"
    if dtype.itemsize > 2 and count * 2 <= free:
        half = "fp16" if device.type == "cuda" else "bf16"
        advice = f"{{dtype}} {half} would fit ({count * 2 / GIB:.1f} GiB)"
    raise FastsdError(
        f"the weights take {count * dtype.itemsize / GIB:.1f} GiB in {dtype_name(dtype)}, "
        f"{free / GIB:.1f} GiB are free on {device}; {advice}",
        path=source,
    )


@dataclass(frozen=True)
class Workload:
    """What the memory of a batch depends on."""

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

        The decoder, one image at a time, holds about four maps of its second widest level at full size (a tile's);
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


def check_workload(workload: Workload, device: torch.device) -> None:
    """Refuse a size and batch that do not fit, and name what would.

    Raises:
        FastsdError: it names what fits: a batch, tiles, a dtype, a size.
    """
    free = available(device)
    if free is not None and workload.size > free:
        raise FastsdError(f"{workload} does not fit into {free / GIB:.1f} GiB; {what_fits(workload, free)}")


def too_large(workload: Workload) -> FastsdError:
    """What to raise when memory ran out although `check_picture` had no objection."""
    return FastsdError(f"not enough memory for {workload}; {what_fits(workload, workload.size - 1, 'would take less')}")


def what_fits(workload: Workload, free: int, praise: str = "would fit") -> str:
    """The changes that make a workload fit into `free` bytes: each that suffices alone, or else all together."""
    offers = []
    batch = workload.batch
    while batch > 1 and replace(workload, batch=batch).size > free:
        batch //= 2
    small = smaller(workload, free)
    half = replace(workload, dtype=torch.float16) if workload.dtype == torch.float32 else workload
    if replace(workload, batch=batch).size <= free:
        offers.append(f"{{batch_size}} {batch}")
    if not workload.tiled and replace(workload, tiled=True).size <= free:
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


def smaller(workload: Workload, free: int) -> Workload | None:
    """The workload with its sides halved until it fits, or None."""
    factor = workload.vae.downscale
    while workload.size > free:
        if min(workload.width, workload.height) < 2 * factor:
            return None
        width, height = (n // 2 // factor * factor for n in (workload.width, workload.height))
        workload = replace(workload, width=width, height=height)
    return workload
