"""Whether a model, and images of a given size, fit into memory: checked before the work starts."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fastsd.config import AutoencoderConfig, UNetConfig
from fastsd.cuda.capture import ran_out_of_memory
from fastsd.errors import FastsdError
from fastsd.model.tiling import TILE
from fastsd.runtime.devices import dtype_name

GIB = 2**30


def available(device: torch.device) -> int | None:
    """Free bytes on `device`, or None where the system does not say.

    GPU memory that PyTorch's allocator caches after earlier work counts as free.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        try:
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (ValueError, OSError, AttributeError):
            return None


def check_weights(source: Path, parameters: int, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse a model whose weights cannot fit, and name a precision in which they would.

    Args:
        source: the model, for the message.
        parameters: its parameter count.
        dtype, device: of the loaded weights.

    Raises:
        FastsdError: with the bytes that are needed and free.
    """
    free = available(device)
    if free is None or parameters * dtype.itemsize <= free:
        return
    advice = "close other programs or take a smaller model"
    if dtype.itemsize > 2 and parameters * 2 <= free:
        half = "fp16" if device.type == "cuda" else "bf16"
        advice = f"{{dtype}} {half} would fit ({parameters * 2 / GIB:.1f} GiB)"
    raise FastsdError(
        f"the weights take {parameters * dtype.itemsize / GIB:.1f} GiB in {dtype_name(dtype)}, "
        f"{free / GIB:.1f} GiB are free on {device}; {advice}",
        path=source,
    )


@dataclass(frozen=True)
class Workload:
    """What the memory for a batch of images depends on."""

    unet: UNetConfig
    vae: AutoencoderConfig
    width: int
    height: int
    batch: int
    dtype: torch.dtype
    tiled: bool
    parts: int = 2  # samples that the UNet runs for an image
    vae_dtype: torch.dtype | None = None  # where it is not `dtype`

    @property
    def activation_bytes(self) -> int:
        """Bytes of activations at the peak of a run: a rough upper bound.

        The decoder, which decodes one image at a time, holds about four maps of its second widest level at full size (a
        tile's, where it is tiled). The UNet with guidance holds its skip connections and a feed-forward eight times as
        wide as the tokens.
        """
        tile = TILE * self.vae.downscale
        width, height = (min(side, tile) if self.tiled else side for side in (self.width, self.height))
        decoder = 4 * width * height * max(self.vae.block_out_channels[:2])
        tokens = (self.width // self.vae.downscale) * (self.height // self.vae.downscale)
        denoiser = self.parts * self.batch * tokens * self.unet.block_out_channels[0] * 24
        return decoder * (self.vae_dtype or self.dtype).itemsize + denoiser * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.width}x{self.height} in batches of {self.batch}"


def check_workload(workload: Workload, device: torch.device) -> None:
    """Refuse a workload that cannot fit.

    Raises:
        FastsdError: with what would fit: a batch size, tiles, a dtype, an image size.
    """
    free = available(device)
    if free is not None and workload.activation_bytes > free:
        raise FastsdError(f"{workload} does not fit into {free / GIB:.1f} GiB; {what_fits(workload, free)}")


@contextmanager
def fitting(workload: Workload) -> Iterator[None]:
    """Inside this context, memory that runs out although `check_workload` passed is an error of one line.

    Raises:
        FastsdError: with what would take less.
    """
    try:
        yield
    except Exception as error:
        if not ran_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # whoever keeps the error would keep their tensors
        less = what_fits(workload, workload.activation_bytes - 1, "would take less")
        raise FastsdError(f"not enough memory for {workload}; {less}") from error


def what_fits(workload: Workload, free: int, verb: str = "would fit") -> str:
    """The changes that make a workload fit into `free` bytes: each that is enough alone, or else all of them."""
    batch = workload.batch
    while batch > 1 and replace(workload, batch=batch).activation_bytes > free:
        batch //= 2
    shrunk = shrink(workload, free)
    half = replace(workload, dtype=torch.float16, vae_dtype=None) if workload.dtype == torch.float32 else workload
    offers = []
    if replace(workload, batch=batch).activation_bytes <= free:
        offers.append(f"{{batch_size}} {batch}")
    if not workload.tiled and replace(workload, tiled=True).activation_bytes <= free:
        offers.append("{vae_tiling}")
    if half.activation_bytes <= free:
        offers.append("{dtype} fp16 or bf16")
    if shrunk is not None:
        offers.append(f"{shrunk.width}x{shrunk.height}")
    if offers:
        return f"{' or '.join(offers)} {verb}"
    shrunk = shrink(replace(half, batch=1, tiled=True), free)
    if shrunk is None:
        return "no size fits; close other programs"
    return f"{shrunk.width}x{shrunk.height} with {{batch_size}} 1, {{vae_tiling}} and {{dtype}} fp16 or bf16 {verb}"


def shrink(workload: Workload, free: int) -> Workload | None:
    """The workload with its sides halved until it fits, or None."""
    factor = workload.vae.downscale
    while workload.activation_bytes > free:
        if min(workload.width, workload.height) < 2 * factor:
            return None
        width, height = (side // 2 // factor * factor for side in (workload.width, workload.height))
        workload = replace(workload, width=width, height=height)
    return workload
