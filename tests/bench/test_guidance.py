"""bench.guidance on the tiny model: every option is a step of its own kind, and has a row."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.families import FAMILIES
from bench.guidance import PLAIN, WAYS, measure, table
from bench.models import pipeline_of, random_components
from fastsd.model.unet import UNet


@pytest.mark.heavy
def test_each_way_measures_the_step_that_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    family, device = FAMILIES["tiny"], torch.device("cpu")
    pipe = pipeline_of(random_components(family, torch.float32, device), device, torch.float32)
    calls: list[tuple[int, Any]] = []
    denoise = UNet.denoise

    def noted(self: UNet, x: torch.Tensor, *given: Any, **named: Any) -> torch.Tensor:
        calls.append((len(x), (given + tuple(named.values()))[-1]))
        return denoise(self, x, *given, **named)

    monkeypatch.setattr(UNet, "denoise", noted)
    seconds = measure(pipe, family.size, rounds=1)
    assert seconds.keys() == WAYS.keys() and all(len(found) == 1 and found[0] > 0 for found in seconds.values())
    measured = dict(zip(WAYS, calls[3::2], strict=True))  # after the first call's two steps, the second of each
    samples = [count for count, _ in measured.values()]
    assert samples == [2, 1, 3, 2, 2, 2]
    options = [options for _, options in measured.values()]
    assert options[3].freeu is not None and options[0].freeu is None
    assert [one.deep is not None and one.deep.reuses for one in options] == [False] * 4 + [True] * 2
    assert len(table(seconds).splitlines()) == 2 + len(WAYS) and f"| {PLAIN} |" in table(seconds)
