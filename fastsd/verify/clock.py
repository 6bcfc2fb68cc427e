"""How long things take, side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

ROUNDS = 5
BUDGET = 0.05  # seconds for all rounds of one comparison on the CPU, where one run of each does not take longer
CALLS = 10  # calls in one timed graph


def cpu_seconds(runs: Sequence[Callable[[], Any]]) -> list[float]:
    """Seconds of one call of each, the medians of rounds in which all take turns."""
    once = [_timed(run, 1) for run in runs]  # warms up, too
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
    """Seconds of one call of each on the GPU, the medians of rounds in which all take turns.

    Each is captured in a CUDA graph, as the pipeline runs it, so that starting kernels from Python is not counted; what
    cannot be captured is timed as it is called.
    Inputs are the same every time: small ones stay in the GPU's cache, as most of a UNet's do.
    """
    repeats = [_repeated(run) for run in runs]
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    samples: list[list[float]] = [[] for _ in repeats]
    for _ in range(1 + ROUNDS):  # the first warms up
        for repeat, column in zip(repeats, samples):
            start.record()
            repeat()
            end.record()
            end.synchronize()
            column.append(start.elapsed_time(end) / 1000 / CALLS)
    return [statistics.median(column[1:]) for column in samples]


def _repeated(run: Callable[[], Any]) -> Callable[[], Any]:
    """`CALLS` calls of `run`, as one graph where it can be captured: nothing in it may wait for the GPU.

    It is run once outside the graph first, for what libraries set up and Triton compiles on first use.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(CALLS):
                run()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return lambda: [run() for _ in range(CALLS)]
    return graph.replay


def clock(device: torch.device) -> Callable[[Sequence[Callable[[], Any]]], list[float]]:
    """The clock for a device."""
    return gpu_seconds if device.type == "cuda" else cpu_seconds
