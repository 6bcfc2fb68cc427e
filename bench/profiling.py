"""The profile of a step: a trace, the most expensive kernels, and the time of each kind of layer with its floor."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from bench.ceilings import Ceilings
from bench.roofline import COUNTS, Work
from bench.session import Session

ROWS = 20
PREFIX = "layer:"


def profile_step(
    model: nn.Module,
    run: Callable[[], Any],
    bench: Session,
    dtype: torch.dtype,
    name: str,
    replay: Callable[[], Any] | None = None,
) -> str:
    """Profile one call after a warm-up; write the trace beside the results; return two tables.

    The first table: the 20 kernels (on a CPU: ops) that took longest, with their share. The second: the 20 kinds of
    layer, by type and shape of the input, with their share and their floor.

    Args:
        run: calls `model` eagerly: the layers are those of this call.
        replay: the same work from a graph: kernels and trace are those of the replay.
    """
    with torch.inference_mode():
        run()
        with _annotated(model) as work:
            layers_of = _profiled(run, bench.options.device)
        if replay is not None:
            replay()
        kernels_of = layers_of if replay is None else _profiled(replay, bench.options.device)
    trace = bench.results.path.with_name(f"{bench.results.path.stem}-{name}.trace.json.gz")
    trace.parent.mkdir(parents=True, exist_ok=True)
    kernels_of.export_chrome_trace(str(trace))

    cuda, events = bench.options.device.type == "cuda", layers_of.key_averages()
    eager, _ = _kernel_lines(events, cuda)
    total, kernels = _kernel_lines(kernels_of.key_averages(), cuda)
    layers = _layer_lines(events, cuda, eager, work, bench.ceilings(dtype), dtype.itemsize)
    return "\n".join([f"profile {name}: trace in {trace}; {total / 1e3:.2f} ms", *kernels, *layers])


def _profiled(run: Callable[[], Any], device: torch.device) -> profile:
    """The profiler after one call."""
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])) as profiler:
        run()
        if cuda:
            torch.cuda.synchronize(device)
    return profiler


@contextmanager
def _annotated(model: nn.Module) -> Iterator[dict[str, list[Work]]]:
    """Inside this context each layer with a floor is a region of the trace, and adds its work by the region's label."""
    work: dict[str, list[Work]] = defaultdict(list)
    open_regions: list[tuple[Any, str]] = []

    def begin(layer: nn.Module, args: Any, named: Any) -> None:
        label = f"{type(layer).__name__} {list(args[0].shape)}"
        region = record_function(PREFIX + label)
        region.__enter__()
        open_regions.append((region, label))

    def end(layer: nn.Module, args: Any, named: Any, out: Any) -> None:
        region, label = open_regions.pop()
        region.__exit__(None, None, None)
        count = next(COUNTS[cls] for cls in type(layer).__mro__ if cls in COUNTS)
        layer_work = count(layer, args, named, out)
        work[label] += [layer_work] if layer_work is not None else []

    handles = []
    for layer in model.modules():
        if any(cls in COUNTS for cls in type(layer).__mro__):
            handles.append(layer.register_forward_pre_hook(begin, with_kwargs=True))
            handles.append(layer.register_forward_hook(end, with_kwargs=True))
    try:
        yield work
    finally:
        for handle in handles:
            handle.remove()


def _kernel_lines(events: Any, cuda: bool) -> tuple[float, list[str]]:
    """The time of all kernels in µs, and the table of the most expensive ones."""
    own_time = "self_device_time_total" if cuda else "self_cpu_time_total"
    kernels = [event for event in events if not event.key.startswith(PREFIX) and getattr(event, own_time) > 0]
    if cuda:
        kernels = [event for event in kernels if event.device_type == torch.autograd.DeviceType.CUDA]
    total = sum(getattr(event, own_time) for event in kernels)
    lines = [f"  {'share':>6} {'ms':>8} {'calls':>5}"]
    for event in sorted(kernels, key=lambda event: -getattr(event, own_time))[:ROWS]:
        time = getattr(event, own_time)
        lines.append(f"  {time / total:6.1%} {time / 1e3:8.3f} {event.count:5d} {event.key[:84]}")
    return total, lines


def _layer_lines(
    events: Any, cuda: bool, total: float, work: dict[str, list[Work]], ceilings: Ceilings, itemsize: int
) -> list[str]:
    """The table of the most expensive kinds of layer; `total`: the time of all kernels in µs."""
    whole_time = "device_time_total" if cuda else "cpu_time_total"
    layers = [event for event in events if event.key.startswith(PREFIX)]
    lines = [f"  {'share':>6} {'ms':>8} {'floor':>8} {'calls':>5} by layer, including the layers inside it"]
    for event in sorted(layers, key=lambda event: -getattr(event, whole_time))[:ROWS]:
        label, time = event.key.removeprefix(PREFIX), getattr(event, whole_time)
        floor = 1e3 * sum(w.floor(ceilings, itemsize) for w in work[label])
        lines.append(f"  {time / total:6.1%} {time / 1e3:8.3f} {floor:8.3f} {event.count:5d} {label}")
    return lines
