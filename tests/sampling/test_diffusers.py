"""Every sampler against diffusers' own scheduler in float64: states, inputs, timesteps, draws, inpainting levels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fastsd.config import SchedulerConfig
from fastsd.sampling import advance
from fastsd.sampling.samplers import COLUMNS, SAMPLERS, Table, build
from tests.support.lifted import DRAWS, IMAGE, NOISE, Case, Run, reference, toy_model

# numpy's advice to diffusers about __array__ is not ours to take.
pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers"), pytest.mark.heavy]

SCHEDULER = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "pndm": "PNDMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpm++2m": "DPMSolverMultistepScheduler",
    "dpm++2m_sde": "DPMSolverMultistepScheduler",
    "dpm++sde": "DPMSolverSDEScheduler",
    "dpm++2s": "DPMSolverSinglestepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "lms": "LMSDiscreteScheduler",
    "lcm": "LCMScheduler",
}
EXTRA: dict[str, dict[str, Any]] = {
    "ddpm": {"clip_sample": False},
    "ddim": {"clip_sample": False, "set_alpha_to_one": False},
    "pndm": {"skip_prk_steps": True, "set_alpha_to_one": False},
    "dpm++2m_sde": {"algorithm_type": "sde-dpmsolver++"},
}
NO_SPACING = ("dpm++2s", "lcm")  # diffusers gives these one fixed spacing
ONLY_NOISE = ("pndm", "euler_a", "dpm++sde")  # diffusers knows no prediction of the sample here
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "trailing", "linspace")
STEPS = (5, 20, 50)

# Rounding, not agreement, sets this: 2^-53 times a few hundred operations, times coefficients up to 4096 (zero terminal
# SNR starts at that sigma), is 4e-10.
TOLERANCE = 1e-9


def case_of(
    sampler: str,
    config: SchedulerConfig,
    steps: int,
    start: int | None = None,
    extra: dict[str, Any] | None = None,
    **changes: Any,
) -> Case:
    """diffusers' scheduler for the same config, and the wrapping that a missing feature needs."""
    wrap = config.prediction_type == "sample" and sampler in ONLY_NOISE
    arguments = {
        "num_train_timesteps": config.num_train_timesteps,
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
        "beta_schedule": config.beta_schedule,
        "prediction_type": "epsilon" if wrap else config.prediction_type,
        **EXTRA.get(sampler, {}),
    }
    if sampler not in NO_SPACING:
        arguments |= {"timestep_spacing": config.timestep_spacing, "steps_offset": config.steps_offset}
    if config.rescale_betas_zero_snr:
        arguments["rescale_betas_zero_snr"] = True
    arguments |= extra or {}
    return Case(
        scheduler=SCHEDULER[sampler],
        steps=steps,
        config=tuple(sorted(arguments.items())),
        start=start,
        # diffusers' LMS weighs an image-to-image run's first slopes as if there were four; `order` undoes that.
        growing_order=sampler == "lms" and bool(start),
        image_as_noise=wrap,
        **changes,
    )


def run_table(table: Table, from_image: bool) -> Run:
    """The table on the toy model, through the public state."""
    state = advance.begin(table, NOISE, IMAGE if from_image else None)
    run = Run(states=[state.x.clone()])
    while not state.done:
        x_in, t = advance.model_input(state).clone(), advance.timestep(state)
        noise = None
        if advance.draws(state):
            noise = DRAWS[run.draws]
            run.draws += 1
        advance.step(state, toy_model(x_in, t), noise_i=noise)
        run.inputs.append(x_in)
        run.timesteps.append(t)
        run.states.append(state.x.clone())
        signal, sigma = table.keep[state.index - 1]
        run.keep.append(signal * IMAGE + sigma * NOISE)
    return run


def difference(ours: Run, theirs: Run) -> float:
    """The largest relative difference of any state, model input or inpainting level; inf where the numbers differ."""
    worst = 0.0
    for a, b in ((ours.states, theirs.states), (ours.inputs, theirs.inputs), (ours.keep, theirs.keep)):
        if len(a) != len(b):
            return float("inf")
        for x, y in zip(a, b):
            error = float((x - y).abs().max() / y.abs().max())
            worst = max(worst, error if error == error else float("inf"))
    return worst


def check(table: Table, case: Case) -> None:
    theirs, ours = reference(case), run_table(table, case.start is not None)
    assert ours.timesteps == pytest.approx(theirs.timesteps, abs=1e-9)
    assert ours.draws == theirs.draws
    assert difference(ours, theirs) < TOLERANCE


def starts(sampler: str, steps: int) -> tuple[int | None, ...]:
    """From noise, and from an image at strength 0.6 and 1."""
    return (None, steps - int(steps * 0.6), 0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler", SCHEDULER)
def test_agrees_with_diffusers(sampler: str, spacing: str, prediction: str) -> None:
    if sampler in NO_SPACING and spacing != "leading":
        pytest.skip("diffusers' scheduler has one fixed spacing")
    config = SchedulerConfig(timestep_spacing=spacing, prediction_type=prediction)
    for steps in STEPS:
        for start in starts(sampler, steps):
            check(build(sampler, steps, config, start=start or 0), case_of(sampler, config, steps, start))


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_ddim_with_noise_agrees_with_diffusers(eta: float, spacing: str) -> None:
    # At eta = 1 and some step counts 1 - P - n^2 is 0 but for rounding, and diffusers takes the root of a negative
    # number (in float32 for 39 of 2..100 steps).
    config = SchedulerConfig(timestep_spacing=spacing)
    for steps in STEPS:
        case = case_of("ddim", config, steps, step=(("eta", eta),))
        if not torch.isfinite(reference(case).states[-1]).all():
            assert eta == 1.0
            continue
        check(build("ddim", steps, config, eta=eta), case)


@pytest.mark.parametrize("sampler", ["ddim", "pndm"])
def test_set_alpha_to_one_agrees_with_diffusers(sampler: str) -> None:
    config = SchedulerConfig(set_alpha_to_one=True, steps_offset=0)
    case = case_of(sampler, config, 20, extra={"set_alpha_to_one": True})
    check(build(sampler, 20, config), case)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", ["karras", "exponential"])
@pytest.mark.parametrize("sampler", ["euler", "heun", "lms", "dpm++sde", "dpm++2m", "dpm++2m_sde", "dpm++2s", "unipc"])
def test_schedules_agree_with_diffusers(sampler: str, schedule: str, prediction: str) -> None:
    config = SchedulerConfig(prediction_type=prediction)
    # The first timestep is T - 1; diffusers cuts it to T - 2 where rounding leaves it just below (most betas, not all).
    solver = sampler in ("dpm++2m", "dpm++2m_sde", "dpm++2s", "unipc")
    first = 999 if schedule == "exponential" and solver else None
    for steps in STEPS:
        for start in (None, steps - int(steps * 0.6)):
            case = case_of(sampler, config, steps, start, extra={f"use_{schedule}_sigmas": True}, first=first)
            check(build(sampler, steps, config, schedule=schedule, start=start or 0), case)


@pytest.mark.parametrize("schedule", ["karras", "exponential"])
def test_euler_a_takes_the_levels_of_euler(schedule: str) -> None:
    # diffusers has no such schedules for Euler ancestral; k-diffusion has, with the same sigmas as for Euler.
    config = SchedulerConfig()
    for steps in STEPS:
        levels = ("EulerDiscreteScheduler", ((f"use_{schedule}_sigmas", True),))
        check(build("euler_a", steps, config, schedule=schedule), case_of("euler_a", config, steps, levels_of=levels))


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm++2m", "dpm++2m_sde"])
def test_sgm_uniform_agrees_with_diffusers_given_its_timesteps(sampler: str) -> None:
    config = SchedulerConfig(timestep_spacing="linspace")
    for steps in STEPS:
        times = np.linspace(999, 0, steps + 1)[:-1]
        if sampler.startswith("dpm"):
            times = times.round().astype(int)
        case = case_of(sampler, config, steps, timesteps=tuple(times.tolist()))
        check(build(sampler, steps, config, schedule="sgm_uniform"), case)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "lcm", "euler", "euler_a", "dpm++2m", "dpm++2m_sde", "unipc"])
def test_zero_terminal_snr_agrees_with_diffusers(sampler: str, spacing: str, prediction: str) -> None:
    if sampler in ("ddpm", "ddim", "lcm") and prediction == "epsilon":
        pytest.skip("noise cannot be predicted at zero SNR; test_tables checks that it is refused")
    config = SchedulerConfig(timestep_spacing=spacing, prediction_type=prediction, rescale_betas_zero_snr=True)
    for steps in STEPS:
        check(build(sampler, steps, config), case_of(sampler, config, steps))


@pytest.mark.parametrize("betas", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("sampler", SCHEDULER)
def test_other_betas_agree_with_diffusers(sampler: str, betas: str) -> None:
    config = SchedulerConfig(beta_schedule=betas, beta_start=1e-4, beta_end=0.02, prediction_type="v_prediction")
    check(build(sampler, 20, config), case_of(sampler, config, 20))


def test_cosine_karras_timesteps_are_cut_not_rounded() -> None:
    config = SchedulerConfig(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    case = case_of("dpm++2m", config, 20, extra={"use_karras_sigmas": True}, first=999)
    check(build("dpm++2m", 20, config, schedule="karras"), case)


def test_every_sampler_is_compared() -> None:
    assert set(SAMPLERS) - set(SCHEDULER) == {"euler_maruyama"}  # diffusers has none; see test_euler_maruyama.py


@pytest.mark.parametrize("sampler", SCHEDULER)
def test_a_changed_coefficient_is_noticed(sampler: str) -> None:
    """The comparison can fail: 1e-4 more in any one column, or a flag turned over, is far above the tolerance."""
    config = SchedulerConfig(prediction_type="v_prediction")
    table, theirs = build(sampler, 5, config), reference(case_of(sampler, config, 5))
    assert difference(run_table(table, False), theirs) < TOLERANCE
    for i, column in enumerate(COLUMNS):
        if not table.rows[:, i].any():
            continue
        # LCM's share of x is below 1e-7 for every timestep: there 1e-4 of it is added as if it were 1.
        rows = table.rows.copy()
        rows[:, i] += np.where(rows[:, i] != 0, 1e-4 * (rows[:, i] if abs(rows[:, i]).max() > 1e-4 else 1), 0)
        assert difference(run_table(replace(table, rows=rows), False), theirs) > 100 * TOLERANCE, column
    for i in range(2):
        keep = table.keep.copy()
        keep[:, i] *= 1 + 1e-4
        assert difference(run_table(replace(table, keep=keep), False), theirs) > 100 * TOLERANCE, "keep"
    used = {"save": table.rows[:, COLUMNS.index("s")].any(), "push": table.rows[:, COLUMNS.index("b1")].any()}
    for flag in (name for name, reads in used.items() if reads):
        turned = run_table(replace(table, **{flag: ~getattr(table, flag)}), False)
        assert difference(turned, theirs) > 100 * TOLERANCE, flag
