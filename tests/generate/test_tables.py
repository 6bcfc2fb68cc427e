"""Steps, noise levels and starts of other programs, each against the formula that the program states."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from fastsd.config import SchedulerConfig
from fastsd.generate.like import LIKE, rules_notes
from fastsd.generate.request import plan
from fastsd.generate.tables import make_table
from fastsd.parameters import Settings, check_call
from fastsd.sampling import advance
from fastsd.sampling.samplers import SAMPLERS
from fastsd.sampling.schedule import alphas_cumprod
from fastsd.sampling.table import Table
from tests.support.pipelines import MASK, PHOTO, tiny_components

CONFIG = SchedulerConfig()
SIGMAS = np.sqrt((1 - alphas_cumprod(CONFIG)) / alphas_cumprod(CONFIG))
DEFAULTS = {
    "num_inference_steps": 20,
    "guidance_scale": 5.0,
    "width": 64,
    "height": 64,
    "sampler": "euler",
    "schedule": "default",
}


def table_of(like: str, sampler: str = "euler", schedule: str = "default", steps: int = 20) -> Table:
    settings = check_call({}).replace(like=like, sampler=sampler, schedule=schedule, spacing="linspace", eta=0.0)
    return make_table(settings, CONFIG, steps, steps)


def planned(like: str, **arguments: Any) -> Any:
    return plan(tiny_components(), DEFAULTS, {"prompt": "x", "like": like, "seed": 1, **arguments})


def t_to_sigma(t: np.ndarray) -> np.ndarray:
    """k_diffusion/external.py, `DiscreteSchedule.t_to_sigma`."""
    low, share = np.floor(t).astype(int), t - np.floor(t)
    high = np.minimum(low + 1, 999)
    return np.exp((1 - share) * np.log(SIGMAS[low]) + share * np.log(SIGMAS[high]))


def levels(schedule: str, n: int) -> np.ndarray:
    """modules/sd_schedulers.py of A1111, comfy/samplers.py of ComfyUI; both take k-diffusion's."""
    if schedule == "karras":
        return (SIGMAS[-1] ** (1 / 7) + np.linspace(0, 1, n) * (SIGMAS[0] ** (1 / 7) - SIGMAS[-1] ** (1 / 7))) ** 7
    if schedule == "exponential":
        return np.exp(np.linspace(math.log(SIGMAS[-1]), math.log(SIGMAS[0]), n))
    return t_to_sigma(np.linspace(999, 0, n + 1)[:-1] if schedule == "sgm_uniform" else np.linspace(999, 0, n))


# Image-to-image.

# steps, strength: the steps that run, and those of the schedule.
STEPS = {
    # A1111: t_enc = int(min(strength, 0.999) * steps); the sampler gets sigmas[steps - t_enc - 1:].
    ("a1111", 20, 0.5): (11, 20),
    ("a1111", 20, 0.75): (16, 20),
    ("a1111", 20, 1.0): (20, 20),
    ("a1111", 30, 0.1): (4, 30),
    ("a1111", 4, 0.1): (1, 4),
    ("a1111", 20, 0.0): (1, 20),
    # ComfyUI: new_steps = int(steps / denoise), sigmas[-(steps + 1):].
    ("comfy", 20, 0.5): (20, 40),
    ("comfy", 20, 0.3): (20, 66),
    ("comfy", 20, 1.0): (20, 20),
    ("comfy", 20, 0.0): (0, 20),
    # diffusers: init_timestep = min(int(steps * strength), steps).
    ("diffusers", 20, 0.5): (10, 20),
    ("diffusers", 30, 0.1): (3, 30),
    ("diffusers", 4, 0.1): (0, 4),
}


@pytest.mark.parametrize(("like", "steps", "strength"), STEPS)
def test_the_steps_of_image_to_image(like: str, steps: int, strength: float) -> None:
    stage = planned(like, image=PHOTO, strength=strength, num_inference_steps=steps).passes[0]
    run, total = STEPS[like, steps, strength]
    assert stage.table.steps == run == len(stage.table)
    if run:
        settings = Settings(stage.settings)
        assert np.array_equal(stage.table.rows, make_table(settings, tiny_components().scheduler, total, run).rows)


@pytest.mark.parametrize(("own", "run", "total"), [(10, 10, 22), (None, 10, 20), (30, 30, 66)])
def test_the_second_pass_of_a1111_runs_all_of_its_steps(own: int | None, run: int, total: int) -> None:
    """`setup_img2img_steps`: with "Hires steps", int(steps / strength) of which they all run; without, one step more
    than the share."""
    stage = planned("a1111", hires_scale=2, hires_strength=0.45, hires_steps=own).passes[1]
    assert stage.table.steps == run
    assert np.array_equal(stage.table.rows, make_table(stage.settings, tiny_components().scheduler, total, run).rows)


# Noise levels.


@pytest.mark.parametrize("schedule", ["default", "sgm_uniform", "karras", "exponential"])
@pytest.mark.parametrize("like", ["a1111", "comfy"])
@pytest.mark.parametrize("steps", [1, 7, 20, 30])
def test_noise_levels_are_k_diffusions(like: str, schedule: str, steps: int) -> None:
    """Also of DPM++ 2M, which diffusers gives other levels; rounding: `keep` is computed in float64 twice."""
    wanted = levels(schedule, steps)
    euler = table_of(like, "euler", schedule, steps)
    np.testing.assert_allclose(euler.keep[:-1, 1], wanted[1:], rtol=1e-12)
    solver = table_of(like, "dpm++2m", schedule, steps)
    np.testing.assert_allclose(solver.keep[:-1, 1] / solver.keep[:-1, 0], wanted[1:], rtol=1e-12)
    times = euler.timesteps
    if like == "a1111":  # `sigma_to_t` without quantize
        np.testing.assert_allclose(t_to_sigma(times), wanted, rtol=1e-12)
    else:  # ModelSamplingDiscrete.timestep
        nearest = [np.abs(np.log(sigma) - np.log(SIGMAS)).argmin() for sigma in wanted]
        assert times.tolist() == nearest
    np.testing.assert_array_equal(solver.timesteps, times)


@pytest.mark.parametrize(("like", "sampler"), [("a1111", "dpm2"), ("a1111", "dpm2_a"), ("comfy", "unipc")])
def test_some_samplers_leave_out_the_last_level_but_one(like: str, sampler: str) -> None:
    """A1111's option "discard_next_to_last_sigma", ComfyUI's DISCARD_PENULTIMATE_SIGMA_SAMPLERS: of N + 1 levels."""
    wanted = np.delete(levels("default", 8), -1)
    table = table_of(like, sampler, steps=7)
    first = [row for row in range(len(table)) if row == 0 or table.step[row] != table.step[row - 1]]
    times = table.timesteps[first]
    gap = 0.51 if like == "comfy" else 1e-9  # ComfyUI's are the nearest in log sigma
    np.testing.assert_allclose(times, np.interp(np.log(wanted), np.log(SIGMAS), np.arange(1000)), rtol=0, atol=gap)


def test_a_spacing_of_the_caller_comes_first() -> None:
    leading = planned("a1111", spacing="leading").passes[0].table
    own = planned("none", spacing="leading").passes[0].table
    assert np.array_equal(leading.rows, own.rows)
    assert planned("a1111").settings.spacing == "linspace"


# The start.


@pytest.mark.parametrize("sampler", ["euler", "euler_a", "heun", "dpm++2m", "lms"])
def test_pure_noise_is_scaled_as_each_program_scales_it(sampler: str) -> None:
    """A1111: x * sigmas[0] (modules/sd_samplers_kdiffusion.py, `sample`, without "SGM noise multiplier"). ComfyUI:
    noise * sqrt(1 + sigma^2) (comfy/model_sampling.py, `EPS.noise_scaling` with max_denoise)."""
    sigma = SIGMAS[-1]
    scale = 1.0 if sampler != "dpm++2m" else 1 / math.sqrt(1 + sigma * sigma)  # the variance-preserving latent
    assert table_of("a1111", sampler).init == pytest.approx(sigma * scale, rel=1e-12)
    assert table_of("comfy", sampler).init == pytest.approx(math.sqrt(1 + sigma * sigma) * scale, rel=1e-12)
    # From an image at full strength, ComfyUI adds the image to that noise; A1111 adds noise of sigma.
    assert table_of("comfy", sampler).mix == pytest.approx((scale, math.sqrt(1 + sigma * sigma) * scale), rel=1e-12)
    assert table_of("a1111", sampler).mix == pytest.approx((scale, sigma * scale), rel=1e-12)


@pytest.mark.parametrize("sampler", ["ddim", "pndm", "unipc"])
def test_samplers_of_timesteps_start_from_noise_as_it_is(sampler: str) -> None:
    """A1111: modules/sd_samplers_timesteps.py, `CompVisSampler.sample`."""
    assert table_of("a1111", sampler).init == 1.0


def test_an_inpainting_of_full_strength_starts_from_the_image_but_in_diffusers() -> None:
    """diffusers, `prepare_latents` with is_strength_max: noise alone."""
    assert {name: rules.pure_noise_at_full for name, rules in LIKE.items()} == {
        "none": True,
        "a1111": False,
        "comfy": False,
        "diffusers": True,
    }
    assert planned("a1111", image=PHOTO, mask_image=MASK, strength=1.0).passes[0].rules is LIKE["a1111"]


# DDIM.


@pytest.mark.parametrize("eta", [0.0, 0.5])
@pytest.mark.parametrize(("steps", "t_enc"), [(20, None), (30, None), (7, None), (20, 10), (30, 21)])
def test_ddim_makes_the_calls_of_a1111(steps: int, t_enc: int | None, eta: float) -> None:
    """modules/sd_samplers_timesteps_impl.py, `ddim`, as a loop over the latent; a run from an image has the first
    `t_enc` timesteps and starts at the next one's level."""
    alphas = alphas_cumprod(CONFIG)
    times = np.clip(np.arange(0, 1000, 1000 // steps) + 1, 0, 999)
    image, noise, *fresh = np.random.RandomState(0).randn(42, 4)
    x = noise
    if t_enc is not None:
        x = image * alphas[times[t_enc]] ** 0.5 + noise * (1 - alphas[times[t_enc]]) ** 0.5
        times = times[:t_enc]
    calls = []
    for i in range(len(times) - 1):
        index = len(times) - 1 - i
        a_t, a_prev = alphas[times[index]], alphas[times[index - 1]]
        sigma = eta * np.sqrt((1 - a_prev) / (1 - a_t) * (1 - a_t / a_prev))
        calls.append(times[index])
        e_t = np.sin(x) + times[index] / 1000
        pred_x0 = (x - (1 - a_t) ** 0.5 * e_t) / a_t**0.5
        x = a_prev**0.5 * pred_x0 + (1 - a_prev - sigma**2) ** 0.5 * e_t + sigma * fresh[i]
    settings = check_call({}).replace(like="a1111", sampler="ddim", schedule="default", spacing="leading", eta=eta)
    run = steps if t_enc is None else t_enc + 1
    table = make_table(settings, CONFIG, steps, run)
    assert table.timesteps.tolist() == calls
    shape = (1, 1, 1, 4)
    state = advance.begin(
        table,
        torch.from_numpy(noise).reshape(shape),
        None if t_enc is None else torch.from_numpy(image).reshape(shape),
    )
    for i in range(len(table)):
        out = torch.sin(state.x) + advance.timestep(state) / 1000
        advance.step(state, out, noise_i=torch.from_numpy(fresh[i]).reshape(shape))
    np.testing.assert_allclose(state.x.numpy().ravel(), x, rtol=1e-9)


def test_ddim_of_a1111_is_a_run_like_any_other() -> None:
    assert len(planned("a1111", sampler="ddim").passes[0].table) == 19
    assert planned("a1111", sampler="ddim").settings.spacing == "leading"
    assert len(planned("a1111", sampler="ddim", spacing="trailing").passes[0].table) == 20
    for strength in (0.0, 0.05, 0.1, 0.5, 1.0):
        assert len(planned("a1111", sampler="ddim", image=PHOTO, strength=strength).passes[0].table) >= 1


# Names.


def test_a_sampler_without_a_schedule_has_a1111s_favourite() -> None:
    for sampler, schedule in LIKE["a1111"].schedules.items():
        settings = planned("a1111", sampler=sampler).settings
        assert (settings.sampler, settings.schedule) == (sampler, schedule)
        assert planned("a1111", sampler=sampler, schedule="default").settings.schedule == "default"
        assert planned("none", sampler=sampler).settings.schedule == "default"
    assert planned("a1111", sampler="euler").settings.schedule == "default"


def test_comfyuis_ddim_is_euler() -> None:
    """comfy/samplers.py, `sampler_object`: "ddim" is ksampler("euler")."""
    assert planned("comfy", sampler="ddim").settings.sampler == "euler"


@pytest.mark.parametrize("like", ["a1111", "comfy"])
def test_noise_that_is_not_drawn_is_said(like: str) -> None:
    for sampler in LIKE[like].trees:
        assert sampler in SAMPLERS
        assert any("Brownian tree" in note for note in planned(like, sampler=sampler).notes)
    assert rules_notes(planned(like, sampler="euler_a").settings) == []
