"""Where a step's time goes: a torch profiler trace, the dearest kernels, and each layer's time beside its floor."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from bench.roofline import COUNTS, Work
from bench.session import Session

ROWS = 20


def profile_step(model: nn.Module, run: Callable[[], Any], bench: Session, dtype: torch.dtype, name: str) -> str:
    """Profile one call of `run` after a warm one; write the trace beside the results; return two tables.

    The first table: the 20 kernels (on a CPU: ops) that took longest, with their share. The second: the 20 kinds of
    layer, by type and shape of output, with their share and the floor of what they must do.
    """
    cuda = bench.options.device.type == "cuda"
    work: dict[str, list[Work]] = defaultdict(list)
    running: list[Any] = []

    def begin(layer: nn.Module, args: Any, named: Any) -> None:
        region = record_function(f"layer:{type(layer).__name__} {list(args[0].shape)}")
        region.__enter__()
        running.append((region, f"{type(layer).__name__} {list(args[0].shape)}"))

    def end(layer: nn.Module, args: Any, named: Any, out: Any) -> None:
        region, label = running.pop()
        region.__exit__(None, None, None)
        count = next(COUNTS[cls] for cls in type(layer).__mro__ if cls in COUNTS)
        done = count(layer, args, named, out)
        work[label] += [done] if done is not None else []

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    with torch.inference_mode():
        run()
        handles = []
        for layer in model.modules():
            if any(cls in COUNTS for cls in type(layer).__mro__):
                handles.append(layer.register_forward_pre_hook(begin, with_kwargs=True))
                handles.append(layer.register_forward_hook(end, with_kwargs=True))
        try:
            with profile(activities=activities) as found:
                run()
                if cuda:
                    torch.cuda.synchronize()
        finally:
            for handle in handles:
                handle.remove()
    trace = bench.results.path.with_name(f"{bench.results.path.stem}-{name}.trace.json.gz")
    trace.parent.mkdir(parents=True, exist_ok=True)
    found.export_chrome_trace(str(trace))

    events = found.key_averages()
    own = "self_device_time_total" if cuda else "self_cpu_time_total"
    whole = "device_time_total" if cuda else "cpu_time_total"
    kernels = [e for e in events if not e.key.startswith("layer:") and getattr(e, own) > 0]
    if cuda:
        kernels = [e for e in kernels if e.device_type == torch.autograd.DeviceType.CUDA]
    total = sum(getattr(e, own) for e in kernels)
    lines = [f"profile {name}: trace in {trace}; {total / 1e3:.2f} ms", f"  {'share':>6} {'ms':>8} {'calls':>5}"]
    for event in sorted(kernels, key=lambda e: -getattr(e, own))[:ROWS]:
        time = getattr(event, own)
        lines.append(f"  {time / total:6.1%} {time / 1e3:8.3f} {event.count:5d} {event.key[:84]}")
    ceilings = bench.ceilings(dtype)
    layers = [e for e in events if e.key.startswith("layer:")]
    lines.append(f"  {'share':>6} {'ms':>8} {'floor':>8} {'calls':>5} by layer; one that holds others counts them in")
    for event in sorted(layers, key=lambda e: -getattr(e, whole))[:ROWS]:
        label, time = event.key.removeprefix("layer:"), getattr(event, whole)
        floor = 1e3 * sum(w.floor(ceilings, dtype.itemsize) for w in work[label])
        lines.append(f"  {time / total:6.1%} {time / 1e3:8.3f} {floor:8.3f} {event.count:5d} {label}")
    return "\n".join(lines)
