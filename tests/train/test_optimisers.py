"""The learning rate over a stage; averaged weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastsd.errors import FastsdError
from fastsd.train.optimisers import Average, learning_rate, make_optimiser
from fastsd.train.settings import Fit


def test_learning_rate_rises_then_falls() -> None:
    fit = Fit(steps=100, rate=1.0, warmup=10, final_rate=0.1)
    assert [learning_rate(fit, step) for step in (0, 9, 10)] == pytest.approx([0.1, 1.0, 1.0])
    assert learning_rate(fit, 55) == pytest.approx(0.55)
    assert learning_rate(fit, 100) == pytest.approx(0.1)
    constant = Fit(steps=100, rate=1.0, warmup=10, schedule="constant")
    assert [learning_rate(constant, step) for step in (4, 10, 55, 100)] == pytest.approx([0.5, 1.0, 1.0, 1.0])


def test_the_average_changes_places_with_the_weights() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    average = Average([parameter], 0.75)
    for step in range(30):
        with torch.no_grad():
            parameter.fill_(1.0)
        average.update(step)
    # From step 29 on the decay is 0.75; before, (1 + step) / (10 + step): the distance to 1 is their product.
    expected = 1 - torch.tensor([min(0.75, (1 + n) / (10 + n)) for n in range(30)]).prod()
    with average.in_place():
        torch.testing.assert_close(parameter.detach(), expected.expand(3), rtol=1e-6, atol=1e-6)
    assert torch.equal(parameter.detach(), torch.ones(3))


def test_eight_bits_are_refused_on_the_cpu() -> None:
    fit = Fit(steps=1, optimiser="adamw8bit")
    with pytest.raises(FastsdError, match="needs a GPU; on the CPU use adamw"):
        make_optimiser(fit, [nn.Parameter(torch.zeros(1))], torch.device("cpu"))
