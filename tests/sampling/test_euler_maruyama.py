"""Euler-Maruyama, which diffusers does not have for this process, against the exact solution for Gaussian data."""

from __future__ import annotations

import math

import pytest
import torch

from fastsd.config import SchedulerConfig
from fastsd.sampling import advance
from fastsd.sampling.build import build
from fastsd.sampling.schedule import alphas_cumprod
from fastsd.sampling.table import Table

MEAN, STD = 0.6, 0.5  # of the data, unlike those of the process (0, 1)


def config_of(prediction_type: str = "epsilon") -> SchedulerConfig:
    return SchedulerConfig(timestep_spacing="trailing", prediction_type=prediction_type)


def gain(alpha_bar: float) -> float:
    """g in E[image | x] = MEAN + g (x - sqrt(alpha_bar) MEAN), the perfect denoiser of Gaussian data."""
    return math.sqrt(alpha_bar) * STD**2 / (alpha_bar * STD**2 + 1 - alpha_bar)


def network(x: torch.Tensor, alpha_bar: float, prediction_type: str) -> torch.Tensor:
    """The output of a perfect network of that prediction type."""
    signal, noise = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
    image = MEAN + gain(alpha_bar) * (x - signal * MEAN)
    epsilon = (x - signal * image) / noise
    return {"epsilon": epsilon, "v_prediction": signal * epsilon - noise * image, "sample": image}[prediction_type]


def moments(table: Table, config: SchedulerConfig) -> list[tuple[float, float]]:
    """The exact mean and variance after every row: with this denoiser each row is affine in x."""
    alpha_bar = alphas_cumprod(config)
    mean, variance = table.mix[0] * MEAN, table.mix[0] ** 2 * STD**2 + table.mix[1] ** 2
    result = []
    for row in table.rows:
        A, a, b0, n = alpha_bar[int(row[0])], row[4], row[6], row[10]
        mean = a * mean + b0 * (MEAN + gain(A) * (mean - math.sqrt(A) * MEAN))
        variance = (a + b0 * gain(A)) ** 2 * variance + n**2
        result.append((mean, variance))
    return result


def exact_moments(table: Table) -> list[tuple[float, float]]:
    """Mean and variance of noised data at the level after every row: those of the reverse SDE."""
    return [(signal * MEAN, signal**2 * STD**2 + noise**2) for signal, noise in table.keep]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_samples_have_the_mean_and_variance_of_the_data(prediction_type: str) -> None:
    config = config_of(prediction_type)
    table, alpha_bar = build("euler_maruyama", 100, config), alphas_cumprod(config)
    generator = torch.Generator().manual_seed(1)

    def normal() -> torch.Tensor:
        return torch.randn(1, 100, 100, 4, generator=generator, dtype=torch.float64)

    state = advance.begin(table, normal(), MEAN + STD * normal())
    count = state.x.numel()
    for i, (expected, truth) in enumerate(zip(moments(table, config), exact_moments(table))):
        noise = normal() if advance.draws_noise(state) else None
        x_in = advance.model_input(state)
        out = network(x_in, float(alpha_bar[int(advance.timestep(state))]), prediction_type)
        advance.step(state, out, noise_i=noise)
        if i % 20 < 19:
            continue
        # Five standard errors of 40,000 samples in each of 5 rows, and the exact error of 100 steps.
        mean_tolerance = 5 * math.sqrt(truth[1] / count) + abs(expected[0] - truth[0])
        variance_tolerance = 5 * truth[1] * math.sqrt(2 / count) + abs(expected[1] - truth[1])
        assert abs(float(state.x.mean()) - truth[0]) < mean_tolerance
        assert abs(float(state.x.var()) - truth[1]) < variance_tolerance


def test_the_discretisation_error_is_small_and_of_first_order() -> None:
    config = config_of()
    errors = []
    for steps in (250, 500, 1000):
        table = build("euler_maruyama", steps, config)
        (mean, variance), truth = moments(table, config)[-1], exact_moments(table)[-1]
        errors.append((abs(mean - truth[0]), abs(variance - truth[1])))
    assert errors[0][0] < 1e-3 and errors[0][1] < 1e-3
    for coarse, fine in zip(errors, errors[1:]):
        for coarse_error, fine_error in zip(coarse, fine):
            assert coarse_error / fine_error == pytest.approx(2, rel=0.1)  # twice the steps, half the error


def test_no_noise_is_added_after_the_last_call() -> None:
    table = build("euler_maruyama", 20, config_of())
    assert table.rows[-1, 10] == 0 and not table.draw[-1]
    assert (table.rows[:-1, 10] > 0).all() and table.draw[:-1].all()
