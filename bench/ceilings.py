"""The peak rates of this device, measured before each benchmark."""

from __future__ import annotations

import math
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bench.measure import timed
from fastsd.model.layers import Conv2d

LONGEST = 2.0  # seconds of the samples of one rate


@dataclass(frozen=True)
class Ceilings:
    """Rates per second: operations of a large matrix product or convolution, bytes of a large copy, exponentials."""

    flops: float
    bytes: float
    exps: float


def measure_ceilings(device: torch.device, dtype: torch.dtype, side: int = 0, megabytes: int = 0) -> Ceilings:
    """Measure the peak rates of this device, the best of several tries.

    Operations: a product of two square random matrices (8192 on a GPU, 2048 on a CPU), and on a CPU also a large 3 x 3
    convolution, since on some CPUs PyTorch's fp32 matrix products are slower than its convolutions. Bytes: a copy of a
    buffer far larger than any cache, reads and writes both counted. Exponentials: of a block that fits in the cache; on
    a GPU the specified rate instead, 16 per clock and multiprocessor at the highest clock.
    """
    cuda = device.type == "cuda"
    n = side or (8192 if cuda else 512 if _emulated(dtype) else 2048)
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
    """Operations per second of a 3 x 3 convolution from `channels` to `channels` at 64 x 64 pixels."""
    with torch.inference_mode():
        layer = Conv2d(channels, channels).to(dtype).eval().requires_grad_(False)
        x = torch.randn(1, 64, 64, channels).to(dtype)
        seconds = _best(lambda: layer(x), x.device)
    return 2 * 9 * channels**2 * x.shape[1] * x.shape[2] / seconds


def _highest_clock(properties: Any, device: torch.device) -> float:
    """The highest clock in Hz, from PyTorch, pynvml or nvidia-smi; infinite (no limit) if none of them reports it."""
    kilohertz = getattr(properties, "clock_rate", None)
    if kilohertz:
        return 1e3 * kilohertz
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(device.index or 0)
        return 1e6 * pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM)
    except Exception:  # not installed, or not reported by the driver
        query = ("--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits")
        command = ["nvidia-smi", f"--id={device.index or 0}", *query]
    try:
        return 1e6 * float(subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return math.inf


def _best(run: Callable[[], Any], device: torch.device, tries: int = 10) -> float:
    """Seconds per run of the fastest of `tries` samples, after three for warm-up; of fewer if they take long."""
    count = 5 if device.type == "cuda" else 1  # runs per sample: CUDA events have a resolution of some microseconds
    times: list[float] = []
    while len(times) < 3 + tries and sum(times) < LONGEST:
        times.append(timed(lambda i: run(), 0, count, device))
    return min(times[3:] or times)


def _emulated(dtype: torch.dtype) -> bool:
    """Whether this processor computes products in `dtype` so slowly that a large one would take minutes."""
    x = torch.ones(256, 256, dtype=dtype)
    return _best(lambda: x @ x, x.device, tries=1) > 0.005  # 7 GFLOP/s; fp32 reaches ten times that
