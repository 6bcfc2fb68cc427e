"""What the device at hand reaches at its best, measured before anything is held against it."""

from __future__ import annotations

import math
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bench.measure import timed
from fastsd.model.layers import Conv2d


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches, a second: operations of a large product or convolution, bytes of a copy, exponentials."""

    flops: float
    bytes: float
    exps: float


def measure_ceilings(device: torch.device, dtype: torch.dtype, side: int = 0, megabytes: int = 0) -> Ceilings:
    """What this device reaches here and now, the best of several tries.

    A product of two square matrices of random numbers (8192 on a GPU, 2048 on a CPU); on a CPU a large 3 x 3
    convolution too, since PyTorch's library for products in fp32 is slower than its library for convolutions on some
    CPUs; a copy of a buffer far larger than any cache, counting what is read and what is written; exponentials of a
    block that fits in the cache. On a GPU the last is not measured but its specified rate, 16 a clock and
    multiprocessor, at its highest clock.
    """
    cuda = device.type == "cuda"
    n = side or (8192 if cuda else 2048)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    flops = 2 * n**3 / _best(lambda: a @ b, device)
    if not cuda:
        flops = max(flops, _convolution(dtype, n // 4))
    source = torch.empty(megabytes << 20 or (2**30 if cuda else 2**27), dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    moved = 2 * source.numel() / _best(lambda: target.copy_(source), device)
    if cuda:
        properties = torch.cuda.get_device_properties(device)
        exps = 16.0 * properties.multi_processor_count * _highest_clock(properties, device)
    else:
        x = torch.randn(2**15)
        out = torch.empty_like(x)
        exps = x.numel() / _best(lambda: torch.exp(x, out=out), device)
    return Ceilings(flops, moved, exps)


def _convolution(dtype: torch.dtype, channels: int) -> float:
    """Operations a second of a 3 x 3 convolution that keeps `channels` at 64 x 64 pixels."""
    with torch.inference_mode():
        layer = Conv2d(channels, channels).to(dtype).eval().requires_grad_(False)
        x = torch.randn(1, 64, 64, channels).to(dtype)
        seconds = _best(lambda: layer(x), x.device)
    return 2 * 9 * channels**2 * x.shape[1] * x.shape[2] / seconds


def _highest_clock(properties: Any, device: torch.device) -> float:
    """Hz: as PyTorch says, or the driver's library, or its program; infinite (no limit) where none of them does."""
    kilohertz = getattr(properties, "clock_rate", None)
    if kilohertz:
        return 1e3 * kilohertz
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(device.index or 0)
        return 1e6 * pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM)
    except Exception:  # not installed, or a driver that does not say
        ask = ["nvidia-smi", f"--id={device.index or 0}", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits"]
    try:
        return 1e6 * float(subprocess.run(ask, capture_output=True, text=True, timeout=20, check=True).stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return math.inf


def _best(run: Callable[[], Any], device: torch.device, tries: int = 10) -> float:
    """Seconds of one run in the fastest of `tries` samples, after three that are not counted."""
    count = 5 if device.type == "cuda" else 1  # runs in a sample: on a GPU its end is known to some microseconds
    times = [timed(lambda i: run(), 0, count, device) for _ in range(3 + tries)]
    return min(times[3:])
