"""Samplers that diffusers does not have, against plain loops of the published algorithms in float64."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from fastsd.config import SchedulerConfig
from fastsd.sampling import advance
from fastsd.sampling.adams import uneven_weights
from fastsd.sampling.build import build
from fastsd.sampling.levels import LEVELS
from fastsd.sampling.samplers import SAMPLERS
from fastsd.sampling.schedule import Schedule
from fastsd.sampling.table import Table
from tests.support import solvers
from tests.support.lifted import DRAWS, IMAGE, NOISE, toy_model
from tests.support.solvers import REFERENCES

STEPS = (1, 2, 3, 5, 7, 20, 40)
# The rounding error: 2^-53 times a few hundred operations, times weights that grow as 1 / h^2 (h is 0.1 in 40 steps).
TOLERANCE = 1e-9


def denoise(schedule: Schedule, times: list[float], sigmas: list[float], x: torch.Tensor, sigma: float) -> torch.Tensor:
    """The clean image by the toy network. A listed level has its listed timestep, which may be rounded."""
    near = int(np.argmin(np.abs(np.log(np.array(sigmas[:-1]) / sigma))))
    listed = abs(sigmas[near] / sigma - 1) < 1e-12
    t = times[near] if listed else float(schedule.timestep_of(np.array([sigma]))[0])
    signal = 1 / np.sqrt(1 + sigma**2)
    out = toy_model(signal * x, t)
    if schedule.config.prediction_type == "epsilon":
        return x - sigma * out
    return signal * (signal * x) - sigma * signal * out  # v: the image is alpha x - sigma v, for the unit-variance x


def run(table: Table, from_image: bool) -> list[torch.Tensor]:
    """The latents after every step, in units of the signal."""
    state = advance.begin(table, NOISE, IMAGE if from_image else None)
    draws, result = iter(DRAWS), []
    while not state.done:
        index = state.index
        noise = next(draws) if advance.draws_noise(state) else None
        advance.step(state, toy_model(advance.model_input(state), advance.timestep(state)), noise_i=noise)
        if index + 1 == len(table) or table.step[index + 1] != table.step[index]:
            result.append(state.x / table.keep[index, 0])
    return result


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("schedule", ["exponential", "karras"])
@pytest.mark.parametrize("sampler", REFERENCES)
def test_agrees_with_the_published_algorithm(sampler: str, schedule: str, prediction: str) -> None:
    config = SchedulerConfig(timestep_spacing="linspace", prediction_type=prediction)
    for steps in STEPS:
        for start in {0, steps // 3}:
            plan = Schedule(config, steps, start, schedule)
            solver = SAMPLERS[sampler].function.startswith("dpm_solver")
            times, sigmas = plan.solver_levels() if solver else plan.karras_levels()
            table = build(sampler, steps, config, schedule=schedule, start=start)
            ours = run(table, from_image=start > 0)
            x = (IMAGE if start else 0) + (sigmas[start] if start or not solver else np.hypot(1, sigmas[0])) * NOISE
            model = partial(denoise, plan, times, sigmas)
            draws = iter(DRAWS)
            theirs = list(REFERENCES[sampler](model, x, sigmas[start:], partial(next, draws)))
            if sampler == "dpm_fast":  # its steps are not the user's
                if steps - start == 1:
                    continue  # one level is no range
                ours = ours[-1:]
            assert len(ours) == len(theirs)
            for mine, other in zip(ours, theirs):
                assert float((mine - other).abs().max() / other.abs().max()) < TOLERANCE, (steps, start)


@pytest.mark.parametrize(("schedule", "steps"), [("turbo", 20), ("linear_quadratic", 20), ("linear_quadratic", 36)])
def test_restart_goes_back_up_from_0_where_no_level_is_near_a_tenth(schedule: str, steps: int) -> None:
    config = SchedulerConfig(timestep_spacing="linspace")
    plan = Schedule(config, steps, 0)
    times, sigmas = plan.at(LEVELS[schedule](plan.sigmas, steps, False))
    draws = iter(DRAWS)
    *_, last = solvers.restart(partial(denoise, plan, times, sigmas), sigmas[0] * NOISE, sigmas, partial(next, draws))
    ours = run(build("restart", steps, config, schedule=schedule), from_image=False)[-1]
    assert float((ours - last).abs().max() / last.abs().max()) < TOLERANCE


def test_ipndm_v_has_comfyuis_weights() -> None:
    """`sample_ipndm_v` in comfy/k_diffusion/sampling.py at sigmas 16, 12, 5, 2, 1, evaluated once."""
    expected = (
        [1.0],
        [1.1666666666666667, -0.16666666666666666],
        [1.6611111111111112, -0.873015873015873, 0.2119047619047619],
        [1.7105158730158732, -0.9628427128427128, 0.28601190476190474, -0.008249403657566922],
    )
    for weights in expected:
        assert uneven_weights([-1.0, -3.0, -7.0, -4.0][: len(weights)]) == pytest.approx(weights, rel=1e-12)


def test_ipndm_v_runs_these_weights_on_slopes() -> None:
    config = SchedulerConfig(timestep_spacing="linspace")
    plan = Schedule(config, 10, 0, "karras")
    times, sigmas = plan.karras_levels()
    theirs = solvers.slopes(lambda levels: uneven_weights([b - a for b, a in zip(levels, levels[1:])]))
    model = partial(denoise, plan, times, sigmas)
    *_, last = theirs(model, sigmas[0] * NOISE, sigmas, lambda: NOISE)
    ours = run(build("ipndm_v", 10, config, schedule="karras"), from_image=False)[-1]
    assert float((ours - last).abs().max() / last.abs().max()) < TOLERANCE
