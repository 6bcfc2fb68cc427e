"""Time by kind of op: from handwritten GPU traces, and from a real trace of this machine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from bench.breakdown import KIND_OF, kinds_of_replay, kinds_of_trace, measured_kinds
from bench.families import TINY
from bench.models import random_components
from bench.roofline import COUNTS, decode_work
from fastsd.model.layers import Conv2d, Linear


def region(kind: str, start: float, end: float) -> dict[str, Any]:
    return {"ph": "X", "cat": "user_annotation", "name": f"kind:{kind}", "ts": start, "dur": end - start}


def launch(number: int, start: float, category: str = "cuda_runtime") -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": "launch", "ts": start, "dur": 3.0, "args": {"correlation": number}}


def kernel(number: int, start: float, duration: float, category: str = "kernel", name: str = "k") -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration, "args": {"correlation": number}}


REGIONS = [
    region("other", 0.0, 100.0),
    region("attention", 10.0, 50.0),
    region("linear", 20.0, 30.0),  # inside the attention
    region("conv", 60.0, 70.0),
    {"ph": "X", "cat": "user_annotation", "name": "an unrelated region", "ts": 0.0, "dur": 90.0},
    {"ph": "M", "name": "process_name", "ts": 0.0},
]


def test_a_kernel_counts_towards_the_layer_that_launched_it() -> None:
    events = [
        *REGIONS,
        launch(1, 25.0), kernel(1, 500.0, 7.0),
        launch(2, 35.0, "cuda_driver"), kernel(2, 507.0, 11.0),  # by Triton, after the inner layer
        launch(3, 65.0), kernel(3, 518.0, 13.0),
        launch(4, 80.0), kernel(4, 531.0, 17.0, "gpu_memcpy"),
        kernel(5, 600.0, 19.0),  # its launch is not in the trace
        {"ph": "X", "cat": "gpu_user_annotation", "name": "kind:conv", "ts": 518.0, "dur": 13.0},
    ]  # fmt: skip
    seconds = kinds_of_trace(events, cuda=True)
    assert {kind: round(1e6 * time, 6) for kind, time in seconds.items()} == {
        "linear": 7.0, "attention": 11.0, "conv": 13.0, "other": 36.0
    }  # fmt: skip


def test_a_replayed_kernel_has_the_kind_of_the_eager_one_and_its_own_time() -> None:
    """All kernels of a graph have one launch. The same kernel (a product, say) serves several kinds."""
    eager = [
        *REGIONS,
        launch(1, 25.0), kernel(1, 500.0, 7.0, name="gemm"),  # linear
        launch(2, 35.0), kernel(2, 507.0, 11.0, name="gemm"),  # attention
        launch(3, 65.0), kernel(3, 518.0, 13.0, name="conv"),
        launch(4, 67.0), kernel(4, 531.0, 1.0, "gpu_memset", name="memset"),  # not in the graph
    ]  # fmt: skip
    replay = [
        launch(9, 1.0),
        kernel(9, 40.0, 3.0, name="conv"),
        kernel(9, 10.0, 1.0, name="gemm"), kernel(9, 20.0, 2.0, name="gemm"),
        kernel(9, 60.0, 5.0, name="gemm"),  # one more than the eager run has
        kernel(9, 50.0, 4.0, name="copy"),
    ]  # fmt: skip
    seconds = kinds_of_replay(eager, replay)
    assert {kind: round(1e6 * time, 6) for kind, time in seconds.items()} == {
        "linear": 1.0, "attention": 2.0, "conv": 3.0, "other": 9.0
    }  # fmt: skip


def test_on_the_host_the_time_of_a_layer_excludes_the_layers_inside_it() -> None:
    seconds = kinds_of_trace(REGIONS, cuda=False)
    assert {kind: round(1e6 * time, 6) for kind, time in seconds.items()} == {
        "linear": 10.0, "attention": 30.0, "conv": 10.0, "other": 50.0
    }  # fmt: skip


def test_the_shares_of_a_real_run_add_up_and_the_slow_kind_dominates() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = Conv2d(8, 8), Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(20):
                x = self.conv(x)
            return self.linear(x)

    model = Pair().eval().requires_grad_(False)
    shares = measured_kinds(model, lambda: model(torch.ones(1, 64, 64, 8)), torch.device("cpu"))
    assert sum(shares.values()) == pytest.approx(1.0)
    assert shares["conv"] > 5 * shares["linear"] > 0


def test_every_layer_with_a_floor_has_a_time() -> None:
    assert KIND_OF.keys() == COUNTS.keys()
    components = random_components(TINY, torch.float32, torch.device("cpu"))
    latent = torch.zeros(1, 8, 8, TINY.vae.latent_channels)
    shares = measured_kinds(components.vae, lambda: components.vae.decode(latent), torch.device("cpu"))
    assert shares.keys() - {"other"} == {work.kind for work in decode_work(TINY, 1, 64)}
    assert not any(module._forward_hooks for module in components.vae.modules())


def test_an_empty_trace_is_an_error(monkeypatch: Any) -> None:
    monkeypatch.setattr("bench.breakdown.kinds_of_trace", lambda events, cuda: {"conv": 0.0})
    with pytest.raises(RuntimeError, match="saw no work"):
        measured_kinds(nn.Linear(1, 1), lambda: None, torch.device("cpu"))
