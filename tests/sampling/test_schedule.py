"""Noise schedules and timesteps against diffusers', for every step count."""

from __future__ import annotations

from dataclasses import replace

import diffusers
import numpy as np
import pytest
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from fastsd.config import SchedulerConfig
from fastsd.sampling.schedule import Schedule, alphas_cumprod

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("scheduler_class", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_timesteps_agree_with_diffusers_for_every_step_count(scheduler_class: str, spacing: str) -> None:
    """Rounding half to even, unrounded linspace for Euler, one more point for DPM-Solver: each shows at few counts."""
    scheduler = getattr(diffusers, scheduler_class)(timestep_spacing=spacing, **SD)
    config = SchedulerConfig(timestep_spacing=spacing)
    for steps in range(1, 201):
        scheduler.set_timesteps(steps)
        schedule = Schedule(config, steps)
        if scheduler_class == "DDIMScheduler":
            times = schedule.timesteps().tolist()
        else:
            times = (schedule.karras_levels if scheduler_class.startswith("Euler") else schedule.solver_levels)()[0]
        theirs = scheduler.timesteps.numpy()
        # In trailing spacing and for 61, 103, ... steps, rounding gives diffusers one more timestep, -1.
        assert len(theirs) == steps or (spacing == "trailing" and len(theirs) == steps + 1 and theirs[-1] == -1)
        np.testing.assert_allclose(times, theirs[:steps], rtol=0, atol=1e-4)  # theirs are float32


@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_alphas_cumprod_agrees_with_diffusers_to_fp32(betas: str) -> None:
    config = SchedulerConfig(beta_schedule=betas)
    theirs = DDIMScheduler(**{**SD, "beta_schedule": betas}).alphas_cumprod.double().numpy()
    # diffusers' betas are float32: 1000 factors, each off by 2^-24.
    np.testing.assert_allclose(alphas_cumprod(config), theirs, rtol=1000 * 2.0**-24)


def test_zero_terminal_snr_keeps_the_first_level_and_zeroes_the_last() -> None:
    plain = SchedulerConfig()
    alpha_bar, before = alphas_cumprod(replace(plain, rescale_betas_zero_snr=True)), alphas_cumprod(plain)
    assert alpha_bar[-1] == 0
    assert alpha_bar[0] == pytest.approx(before[0], rel=1e-14)
    assert (np.diff(alpha_bar) < 0).all()
    assert Schedule(replace(plain, rescale_betas_zero_snr=True), 5).sigmas[-1] == pytest.approx(4096, rel=1e-6)


@pytest.mark.parametrize("schedule", ["karras", "exponential"])
def test_ramps_span_the_right_sigmas(schedule: str) -> None:
    config = SchedulerConfig(timestep_spacing="leading")
    levels = Schedule(config, 10, schedule=schedule)
    _, selected = Schedule(config, 10).karras_levels()
    _, sigmas = levels.karras_levels()
    np.testing.assert_allclose([sigmas[0], sigmas[-2]], [selected[0], selected[-2]], rtol=1e-12)
    times, sigmas = levels.solver_levels()
    np.testing.assert_allclose([sigmas[0], sigmas[-2]], [levels.sigmas[-1], levels.sigmas[0]], rtol=1e-12)
    assert (times[0], times[-1], sigmas[-1]) == (999, 0, 0)
    evenly = np.log(sigmas[:-1]) if schedule == "exponential" else np.power(sigmas[:-1], 1 / 7)
    np.testing.assert_allclose(np.diff(evenly, n=2), 0, atol=1e-12)


def test_timestep_of_inverts_the_sigmas_and_stays_inside() -> None:
    schedule = Schedule(SchedulerConfig(), 5)
    np.testing.assert_allclose(schedule.timestep_of(schedule.sigmas), np.arange(1000), atol=1e-9)
    np.testing.assert_array_equal(schedule.timestep_of(np.array([0.0, 1e9])), [0, 999])
