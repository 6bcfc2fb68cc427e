"""Measured time by kind of op, from a profiler trace and the layers that launched the work.

On a GPU, each kernel counts towards the innermost layer that was running on the host at its launch: the trace links a
kernel to its launch by a correlation number, whether PyTorch, cuDNN or Triton launched it. What users run is the replay
of a graph, where no layer runs on the host: its times count, and the n-th launch of a kernel in it has the kind of the
n-th launch of that kernel in the eager run. On a CPU, the time of a layer excludes that of the layers inside it. Work
outside these layers (additions, concatenations, copies) counts as "other".
"""

from __future__ import annotations

import json
import tempfile
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from bench.roofline import KINDS
from fastsd.model import clip, layers

OTHER = "other"
PREFIX = "kind:"
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of the trace
LAUNCHES = ("cuda_runtime", "cuda_driver")
KIND_OF: dict[type[nn.Module], str] = {
    layers.Linear: "linear",
    layers.Conv2d: "conv",
    layers.Upsample: "conv",
    layers.SelfAttention: "attention",
    layers.CrossAttention: "attention",
    clip.CausalAttention: "attention",
    layers.GEGLU: "linear",
    layers.GroupNorm: "norm",
    layers.LayerNorm: "norm",
}


def kind_of(layer: nn.Module) -> str | None:
    """The kind of a layer's own work, consistent with `bench.roofline`."""
    if isinstance(layer, layers.Conv2d) and layer.weight.shape[2:] == (1, 1):
        return "linear"
    return next((KIND_OF[cls] for cls in type(layer).__mro__ if cls in KIND_OF), None)


def measured_kinds(
    model: nn.Module, run: Callable[[], Any], device: torch.device, replay: Callable[[], Any] | None = None
) -> dict[str, float]:
    """The share of each kind in the time of `run`, which calls `model`, or of `replay`. The sum is 1.

    Args:
        run: eager.
        replay: the same work from a CUDA graph.

    Raises:
        RuntimeError: the trace has no work of the device.
    """
    cuda = device.type == "cuda"
    with torch.inference_mode():
        run()
        with _annotated(model):
            events = _trace(run, device)
        if replay is None:
            seconds = kinds_of_trace(events, cuda)
        else:
            replay()
            seconds = kinds_of_replay(events, _trace(replay, device))
    total = sum(seconds.values())
    if not total > 0:
        raise RuntimeError("the profiler saw no work of the device")
    return {kind: time / total for kind, time in seconds.items()}


def _trace(run: Callable[[], Any], device: torch.device) -> list[dict[str, Any]]:
    """The events of one run, in Chrome's format."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    with profile(activities=activities) as profiler, record_function(PREFIX + OTHER):
        run()
        if cuda:
            torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return events


@contextmanager
def _annotated(model: nn.Module) -> Iterator[None]:
    """Inside this context each layer that has a kind is a region of the trace."""
    open_regions: list[Any] = []

    def begin(layer: nn.Module, args: Any) -> None:
        region = record_function(f"{PREFIX}{kind_of(layer)}")
        region.__enter__()
        open_regions.append(region)

    def end(layer: nn.Module, args: Any, out: Any) -> None:
        open_regions.pop().__exit__(None, None, None)

    handles = []
    for layer in model.modules():
        if kind_of(layer) is not None:
            handles += [layer.register_forward_pre_hook(begin), layer.register_forward_hook(end)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def kinds_of_trace(events: list[dict[str, Any]], cuda: bool) -> dict[str, float]:
    """Seconds by kind: of the kernels, or without `cuda` of the host.

    Args:
        events: of a trace in Chrome's format, times in µs. Regions have the category "user_annotation" and the name
            "kind:<kind>"; a kernel and its launch have the same `args["correlation"]`.
    """
    times, kinds = _innermost(_regions(events))
    seconds = dict.fromkeys((*KINDS, OTHER), 0.0)
    if not cuda:
        for kind, start, end in zip(kinds, times, times[1:]):
            seconds[kind] += (end - start) / 1e6
        return _positive(seconds)
    for event, kind in _kernels(events, times, kinds):
        seconds[kind] += event["dur"] / 1e6
    return _positive(seconds)


def kinds_of_replay(eager: list[dict[str, Any]], replay: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds by kind of a graph's kernels, in the order of their start; a kernel that the eager run has no more of
    counts as "other".

    Args:
        eager, replay: the events of the two runs, as `kinds_of_trace` takes them.
    """
    kinds: dict[str, deque[str]] = {}
    for event, kind in sorted(_kernels(eager, *_innermost(_regions(eager))), key=lambda pair: pair[0]["ts"]):
        kinds.setdefault(event["name"], deque()).append(kind)
    seconds = dict.fromkeys((*KINDS, OTHER), 0.0)
    for event in sorted(_on_device(replay), key=lambda event: event["ts"]):
        waiting = kinds.get(event["name"])
        seconds[waiting.popleft() if waiting else OTHER] += event["dur"] / 1e6
    return _positive(seconds)


def _on_device(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event.get("ph") == "X" and event.get("cat") in ON_DEVICE]


def _kernels(
    events: list[dict[str, Any]], times: list[float], kinds: list[str]
) -> Iterator[tuple[dict[str, Any], str]]:
    """The work of the device with its kind: of the region, as `_innermost` gives them, in which it was launched."""
    launched = {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event.get("ph") == "X" and event.get("cat") in LAUNCHES and "correlation" in event.get("args", {})
    }
    for event in _on_device(events):
        launch = launched.get(event.get("args", {}).get("correlation"))
        region = bisect_right(times, launch) - 1 if launch is not None else -1
        yield event, kinds[region] if region >= 0 else OTHER


def _regions(events: list[dict[str, Any]]) -> list[tuple[float, float, str]]:
    """Start, end and kind of each region."""
    return [
        (event["ts"], event["ts"] + event["dur"], event["name"].removeprefix(PREFIX))
        for event in events
        if event.get("ph") == "X" and event.get("cat") == "user_annotation" and event["name"].startswith(PREFIX)
    ]


def _innermost(regions: Iterable[tuple[float, float, str]]) -> tuple[list[float], list[str]]:
    """The times at which the innermost of nested regions changes, and its kind from then on."""
    times: list[float] = []
    kinds: list[str] = []
    open_regions: list[tuple[float, str]] = []  # end and kind

    def close(until: float) -> None:
        while open_regions and open_regions[-1][0] <= until:
            end, _ = open_regions.pop()
            times.append(end)
            kinds.append(open_regions[-1][1] if open_regions else OTHER)

    for start, end, kind in sorted(regions, key=lambda region: (region[0], -region[1])):
        close(start)
        times.append(start)
        kinds.append(kind)
        open_regions.append((end, kind))
    close(float("inf"))
    return times, kinds


def _positive(seconds: dict[str, float]) -> dict[str, float]:
    return {kind: time for kind, time in seconds.items() if time > 0}
