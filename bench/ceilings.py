"""What the device at hand reaches at its best, measured before anything is held against it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches, a second: operations of a large matrix product, bytes of a copy, exponentials."""

    flops: float
    bytes: float
    exps: float


def measure_ceilings(device: torch.device, dtype: torch.dtype, side: int = 0, megabytes: int = 0) -> Ceilings:
    """What this device reaches here and now, the best of several tries.

    A product of two square matrices of random numbers (8192 on a GPU, 2048 on a CPU); a copy of a buffer far larger
    than any cache, counting what is read and what is written; exponentials of a block that fits in the cache. On a GPU
    the last is not measured but its specified rate, 16 a clock and multiprocessor, at its highest clock.
    """
    cuda = device.type == "cuda"
    n = side or (8192 if cuda else 2048)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    flops = 2 * n**3 / _best(lambda: a @ b, device)
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


def _highest_clock(properties: Any, device: torch.device) -> float:
    """Hz."""
    kilohertz = getattr(properties, "clock_rate", None)
    if kilohertz:
        return 1e3 * kilohertz
    import pynvml

    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(device.index or 0)
    return 1e6 * pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM)


def _best(run: Callable[[], Any], device: torch.device, tries: int = 10) -> float:
    """Seconds of the fastest of `tries` runs, after three that are not counted."""
    times = []
    for _ in range(3 + tries):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[3:])
