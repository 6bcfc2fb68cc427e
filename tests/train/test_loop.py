"""Parts of the training loop: learning rate, batch split, random streams."""

from __future__ import annotations

import pytest
import torch

from fastsd.train.loop import RandomStreams, learning_rate, split_evenly
from fastsd.train.settings import Fit


def test_learning_rate_rises_then_falls() -> None:
    fit = Fit(steps=100, rate=1.0, warmup=10, final_rate=0.1)
    assert [learning_rate(fit, step) for step in (0, 9, 10)] == pytest.approx([0.1, 1.0, 1.0])
    assert learning_rate(fit, 55) == pytest.approx(0.55)
    assert learning_rate(fit, 100) == pytest.approx(0.1)


def test_split_evenly() -> None:
    assert split_evenly(7, 2) == [4, 3] and split_evenly(1, 4) == [1] and split_evenly(9, 3) == [3, 3, 3]


def test_random_streams_depend_on_seed_stage_step_and_worker_alone() -> None:
    def values(*key: int | str) -> tuple[float, float]:
        streams = RandomStreams.create(*key)  # type: ignore[arg-type]
        return streams.numpy.random(), float(torch.rand(1, generator=streams.torch))

    keys = [(0, "diffusion", 3, 1), (1, "diffusion", 3, 1), (0, "autoencoder", 3, 1), (0, "diffusion", 4, 1),
            (0, "diffusion", 3, 0)]  # fmt: skip
    assert values(*keys[0]) == values(*keys[0])
    for i in range(2):  # numpy's and torch's
        assert len({values(*key)[i] for key in keys}) == len(keys)
