"""bench.accelerate on small networks: every part is timed in every way, and the results agree."""

from __future__ import annotations

import pytest
import torch

from bench.accelerate import WAYS, make_pipeline, measure, table


@pytest.mark.heavy
def test_it_measures_every_part() -> None:
    torch.manual_seed(0)
    found = measure(make_pipeline("tiny"), rounds=1, side=8)
    assert set(found["distance"]) == {"text", "step", "decode"}
    for name, distance in found["distance"].items():
        assert max(distance.values()) < 1e-3, name
        assert all(len(found["seconds"][way][name]) == 1 for way in WAYS)
    assert len(table(found).splitlines()) == 5
