"""EDM models: every sampler on them against diffusers' two schedulers, or on a network whose clean image is known."""

from __future__ import annotations

import contextlib
import inspect
from dataclasses import fields, replace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from fastsd.config import EDMConfig, SchedulerConfig, SolverConfig
from fastsd.errors import FastsdError
from fastsd.sampling import advance
from fastsd.sampling.build import build
from fastsd.sampling.edm import precondition
from fastsd.sampling.samplers import SAMPLERS, SCHEDULES
from tests.support.lifted import IMAGE, NOISE, toy_model

PLAYGROUND = SchedulerConfig(sampler="dpm++2m", edm=EDMConfig())
COSXL = SchedulerConfig(prediction_type="v_prediction", sampler="euler", edm=EDMConfig(sigma_data=1.0, sigma_max=120.0))


def theirs(name: str, config: SchedulerConfig, steps: int, start: int | None, **changes: Any) -> list[Any]:
    """Timesteps, model inputs and the last latent of diffusers' scheduler."""
    assert config.edm is not None
    levels = {key: getattr(config.edm, key) for key in ("sigma_data", "sigma_min", "sigma_max", "rho")}
    arguments = {**levels, "sigma_schedule": config.edm.ramp, "prediction_type": config.prediction_type, **changes}
    with double():
        scheduler = getattr(diffusers, name)(**arguments)
        scheduler.set_timesteps(steps)
        times = scheduler.timesteps[start or 0 :]
        scheduler.set_begin_index(start or 0)
        x = NOISE * scheduler.init_noise_sigma if start is None else scheduler.add_noise(IMAGE, NOISE, times[:1])
        inputs = []
        for t in times:
            inputs.append(scheduler.scale_model_input(x, t))
            x = scheduler.step(toy_model(inputs[-1], float(t)).to(torch.float64), t, x).prev_sample
    return [times.tolist(), inputs, x]


@contextlib.contextmanager
def double() -> Any:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def ours(sampler: str, config: SchedulerConfig, steps: int, start: int | None, **how: Any) -> list[Any]:
    table = build(sampler, steps, config, start=start or 0, **how)
    state = advance.begin(table, NOISE, None if start is None else IMAGE)
    inputs = []
    while not state.done:
        inputs.append(advance.model_input(state).clone())
        advance.step(state, toy_model(inputs[-1], advance.timestep(state)))
    return [table.timesteps.tolist(), inputs, state.x]


CASES = [
    ("euler", "EDMEulerScheduler", PLAYGROUND, {}),
    ("euler", "EDMEulerScheduler", COSXL, {}),
    ("euler", "EDMEulerScheduler", replace(PLAYGROUND, edm=EDMConfig(rho=5.0, ramp="exponential")), {}),
    ("euler", "EDMEulerScheduler", PLAYGROUND, {"final_sigmas_type": "sigma_min"}),
    ("dpm++2m", "EDMDPMSolverMultistepScheduler", PLAYGROUND, {}),
    ("dpm++2m", "EDMDPMSolverMultistepScheduler", COSXL, {}),
    ("dpm++2m", "EDMDPMSolverMultistepScheduler", PLAYGROUND, {"solver_order": 3, "solver_type": "heun"}),
    ("dpm++2m", "EDMDPMSolverMultistepScheduler", PLAYGROUND, {"final_sigmas_type": "sigma_min"}),
    ("dpm++2m", "EDMDPMSolverMultistepScheduler", PLAYGROUND, {"euler_at_final": True, "lower_order_final": False}),
]


@pytest.mark.parametrize("steps", [6, 20])
@pytest.mark.parametrize(("sampler", "name", "config", "solver"), CASES)
def test_agrees_with_diffusers(
    sampler: str, name: str, config: SchedulerConfig, solver: dict[str, Any], steps: int
) -> None:
    """diffusers keeps the noise levels in float32, whose rounding of 6e-8 grows to 1e-6 in such a run."""
    config = replace(config, solver=SolverConfig(**solver))
    for start in (None, 2):
        expected, found = theirs(name, config, steps, start, **solver), ours(sampler, config, steps, start)
        assert found[0] == pytest.approx(expected[0], abs=1e-6)
        for x, y in zip([*found[1], found[2]], [*expected[1], expected[2]], strict=True):
            assert float((x - y).abs().max() / y.abs().max()) < 1e-5


def test_every_setting_of_diffusers_is_tried() -> None:
    """A setting that a later diffusers adds fails here until it is followed, noted or refused."""
    levels = {"sigma_schedule" if field.name == "ramp" else field.name for field in fields(EDMConfig)}
    tried = levels | {key for case in CASES for key in case[3]} | {"prediction_type"}
    refused = {"algorithm_type"}  # values of other models: fastsd/weights/layouts/scheduler.py
    noted = {"thresholding", "dynamic_thresholding_ratio", "sample_max_value"}
    idle = {"num_train_timesteps"}  # the levels have their own count
    for name in {case[1] for case in CASES}:
        known = set(inspect.signature(getattr(diffusers, name).__init__).parameters) - {"self", "args", "kwargs"}
        assert known <= tried | refused | noted | idle, name


@pytest.mark.parametrize("config", [PLAYGROUND, COSXL], ids=["Playground", "CosXL"])
@pytest.mark.parametrize(
    "sampler", [name for name in SAMPLERS if SAMPLERS[name].takes_schedule and name != "sa_solver"]
)
def test_every_sampler_ends_at_the_image_that_the_network_predicts(sampler: str, config: SchedulerConfig) -> None:
    """F = (image - c_skip x) / c_out predicts the image exactly; diffusers has only two of the samplers."""
    assert config.edm is not None
    for schedule in SCHEDULES:
        table = build(sampler, 10, config, schedule=schedule)
        assert np.isfinite(table.rows).all()
        state = advance.begin(table, NOISE)
        while not state.done:
            x_in, sigma = advance.model_input(state), np.exp(4 * advance.timestep(state))
            c_in, c_skip, c_out = precondition(config.edm, config.prediction_type, float(sigma))
            out = (IMAGE - c_skip * x_in / c_in) / c_out
            advance.step(state, out, noise_i=torch.zeros_like(NOISE))
        # Two samplers and a schedule end at a level above 0, whose noise is left.
        above = sampler in ("deis", "dpm_fast") or schedule == "kl_optimal"
        left = 4 * np.exp(4 * table.timesteps.min()) if above else 1e-6
        assert float((state.x - IMAGE).abs().max()) < left, schedule


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "pndm", "lcm", "sa_solver"])
def test_a_sampler_of_training_timesteps_is_refused(sampler: str) -> None:
    with pytest.raises(FastsdError, match=f"sampler: {sampler} steps from one training timestep to another"):
        build(sampler, 10, PLAYGROUND)
