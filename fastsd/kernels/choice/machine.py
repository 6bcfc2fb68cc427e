"""CUDA devices as machines that take times."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastsd.cuda.capture import alone, end_capture, ran_out_of_memory
from fastsd.kernels.choice.faults import device_is_lost
from fastsd.kernels.choice.measure import Sampler
from fastsd.kernels.launch import architecture

GRAPH = 2e-4  # seconds of a call above which the time of its launches from Python is hidden: no graph is needed
SAMPLE = 2e-4  # seconds of the calls in one graph
CALLS = 10  # in one graph, at most
HELD = 2**28  # bytes of results in dropped graphs, above which their memory is returned


class CudaMachine:
    """The times of calls on CUDA devices, replayed from CUDA graphs as in the pipeline."""

    def __init__(self) -> None:
        self._streams: dict[int, torch.cuda.Stream] = {}  # one a device: each stream has workspaces of its own
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._held = 0

    def identity(self, device: torch.device) -> dict[str, Any]:
        return {
            "gpu": torch.cuda.get_device_name(device),
            "architecture": architecture.class_of(device),
            "driver": _driver(),
            "torch": torch.__version__,
            "triton": importlib.metadata.version("triton"),
            "fastsd": sys.modules["fastsd"].__version__,  # imported before any of its modules
            "kernels": source_digest(),
        }

    def measures(self, x: torch.Tensor) -> bool:
        # A subclass stands for a tensor without contents, or is observed.
        return x.device.type == "cuda" and type(x) in (torch.Tensor, torch.nn.Parameter)

    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def synchronize(self, device: torch.device) -> None:
        with alone:  # another thread may be capturing
            torch.cuda.synchronize(device)

    def sampler(self, run: Callable[[], Any]) -> Sampler:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

        def seconds(work: Callable[[], Any]) -> float:
            start.record()
            work()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1000

        main, side = torch.cuda.current_stream(), self._side()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            result = run()  # compiles, and allocates this stream's workspaces outside of the graph
            once = seconds(run)
            calls = calls_in_graph(once)
            replay = self._captured(run, calls) if once < GRAPH else None
        main.wait_stream(side)
        if replay is None:
            first = iter([once])  # the first sample is there already
            return lambda: next(first, 0.0) or seconds(run)
        self._held += sum(x.nbytes for x in (result if isinstance(result, tuple) else (result,)) if x is not None)
        return lambda: seconds(replay) / calls

    def release(self) -> None:
        for graph in self._graphs:
            graph.reset()
        self._graphs.clear()
        if self._held > HELD:
            self._held = 0
            with alone:
                torch.cuda.empty_cache()

    def _side(self) -> torch.cuda.Stream:
        index = torch.cuda.current_device()
        if index not in self._streams:
            self._streams[index] = torch.cuda.Stream()
        return self._streams[index]

    def _captured(self, run: Callable[[], Any], calls: int) -> Callable[[], Any] | None:
        """Calls in a graph; None if they cannot be captured. Not by `torch.cuda.graph`, which collects garbage."""
        with alone:
            return self._captured_alone(run, calls)

    def _captured_alone(self, run: Callable[[], Any], calls: int) -> Callable[[], Any] | None:
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        try:
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            for _ in range(calls):
                run()
        except BaseException as error:
            with contextlib.suppress(RuntimeError):  # the first error says why
                end_capture(graph, pool)
            if not isinstance(error, RuntimeError) or ran_out_of_memory(error) or device_is_lost(error):
                raise
            return None
        end_capture(graph, pool)
        self._graphs.append(graph)
        return graph.replay


def calls_in_graph(seconds: float) -> int:
    """How many calls of so many seconds one graph has."""
    return max(min(int(SAMPLE / max(seconds, 1e-6)), CALLS), 1)


@functools.cache
def _driver() -> str:
    """The version of the driver, or of the CUDA that it serves."""
    try:
        found = re.search(r"\s(\d+\.\d+(\.\d+)*)\s", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        found = None
    return found[1] if found else f"CUDA {getattr(torch._C, '_cuda_getDriverVersion', str)() or 'unknown'}"


@functools.cache
def source_digest() -> str:
    """Sixteen digits that change with the source of the kernels."""
    files = sorted(Path(__file__).parent.parent.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
