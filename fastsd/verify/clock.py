"""Interleaved timing of functions, on the CPU and on the GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastsd.cuda.capture import CudaRecorder, ran_out_of_memory

ROUNDS = 5
BUDGET = 0.05  # seconds for all rounds of a comparison on the CPU; at least one round always runs
CALLS = 10  # calls in one timed graph


def cpu_seconds(runs: Sequence[Callable[[], Any]]) -> list[float]:
    """Seconds per call of each function: medians over rounds in which they take turns."""
    once = [_timed(run, 1) for run in runs]  # also warms up
    calls = [min(max(int(0.001 / max(seconds, 1e-9)), 1), 100) for seconds in once]
    cost = sum(seconds * count for seconds, count in zip(once, calls))
    rounds = min(max(int(BUDGET / max(cost, 1e-9)), 1), ROUNDS)
    samples = [[_timed(run, count) for run, count in zip(runs, calls)] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*samples)]


def _timed(run: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def gpu_seconds(runs: Sequence[Callable[[], Any]]) -> list[float]:
    """Seconds per call of each function on the GPU: medians over rounds in which they take turns.

    Each function is captured in a CUDA graph, as in the pipeline, so the time excludes kernel launches from Python. A
    function that cannot be captured is called directly. Inputs do not change between calls; small ones stay in the L2
    cache, as most activations of a UNet do.
    """
    repeats = [_repeated(run) for run in runs]
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    samples: list[list[float]] = [[] for _ in repeats]
    for _ in range(1 + ROUNDS):  # the first is the warm-up
        for repeat, column in zip(repeats, samples):
            start.record()
            repeat()
            end.record()
            end.synchronize()
            column.append(start.elapsed_time(end) / 1000 / CALLS)
    return [statistics.median(column[1:]) for column in samples]


def _repeated(run: Callable[[], Any]) -> Callable[[], Any]:
    """`CALLS` calls of `run`, as one CUDA graph if it can be captured, that is, if it never waits for the GPU.

    Calls outside the graph cover the set-up of libraries and the compilation of Triton kernels.
    """

    def calls() -> None:
        for _ in range(CALLS):
            run()

    try:
        return CudaRecorder(torch.device("cuda", torch.cuda.current_device())).record(calls, warm_up=run)
    except Exception as error:
        if ran_out_of_memory(error):
            raise
        return calls


def clock_for(device: torch.device) -> Callable[[Sequence[Callable[[], Any]]], list[float]]:
    """The timing function of a device."""
    return gpu_seconds if device.type == "cuda" else cpu_seconds
