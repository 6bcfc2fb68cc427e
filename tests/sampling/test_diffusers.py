"""Every sampler against diffusers' scheduler in float64: states, model inputs, timesteps, draws, inpainting levels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fastsd.config import SchedulerConfig
from fastsd.sampling.build import build
from fastsd.sampling.samplers import SAMPLERS, complete
from fastsd.sampling.table import COLUMNS, Table
from tests.support.lifted import Case, difference, reference, run_table
from tests.support.solvers import REFERENCES

# numpy warns about diffusers' own __array__.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")

SCHEDULER = {name: entry.diffusers for name, entry in SAMPLERS.items() if entry.diffusers}
SCHEDULER["dpm++2m_sde"] = SCHEDULER["dpm++2m_sde_heun"] = "DPMSolverMultistepScheduler"
EXTRA: dict[str, dict[str, Any]] = {
    "ddpm": {"clip_sample": False},
    "ddim": {"clip_sample": False, "set_alpha_to_one": False},
    "pndm": {"skip_prk_steps": True, "set_alpha_to_one": False},
    "dpm++2m_sde": {"algorithm_type": "sde-dpmsolver++"},
    "dpm++2m_sde_heun": {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"},
}
FIXED_SPACING = ("dpm++2s", "lcm", "tcd")  # in diffusers
WITHOUT_SAMPLE = (
    "pndm",
    "euler_a",
    "dpm++sde",
    "dpm2",
    "dpm2_a",
)  # diffusers has no prediction of the sample for these
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "trailing", "linspace")
STEPS = (5, 20, 50)

# The rounding error: 2^-53 times a few hundred operations, times coefficients up to 4096 (the first sigma with zero
# terminal SNR), is 4e-10.
TOLERANCE = 1e-9


def case_of(
    sampler: str,
    config: SchedulerConfig,
    steps: int,
    start: int | None = None,
    extra: dict[str, Any] | None = None,
    **changes: Any,
) -> Case:
    """diffusers' scheduler for the same config. Where it has no prediction of the sample, the sample becomes noise."""
    config = complete(config, sampler)
    convert = config.prediction_type == "sample" and sampler in WITHOUT_SAMPLE
    arguments = {
        "num_train_timesteps": config.num_train_timesteps,
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
        "beta_schedule": config.beta_schedule,
        "prediction_type": "epsilon" if convert else config.prediction_type,
        **EXTRA.get(sampler, {}),
    }
    if sampler not in FIXED_SPACING:
        arguments |= {"timestep_spacing": config.timestep_spacing, "steps_offset": config.steps_offset}
    if config.rescale_betas_zero_snr:
        arguments["rescale_betas_zero_snr"] = True
    arguments |= extra or {}
    return Case(
        scheduler=SCHEDULER[sampler],
        steps=steps,
        config=tuple(sorted(arguments.items())),
        start=start,
        # In image-to-image, diffusers' LMS weighs the first slopes as if there were four; its `order` corrects that.
        growing_order=sampler == "lms" and bool(start),
        image_as_noise=convert,
        **({"step": (("eta", 0.0),)} if sampler == "tcd" and "step" not in changes else {}),
        **changes,
    )


def check(table: Table, case: Case, keep: bool = True) -> None:
    theirs, ours = reference(case), run_table(table, case.start is not None)
    ours.keep = ours.keep if keep else theirs.keep
    # diffusers subtracts nearly equal squares for DPM2's sigma_down: at the cosine betas' 20,000 that costs 1e-8.
    assert ours.timesteps == pytest.approx(theirs.timesteps, abs=1e-7)
    assert ours.draws == theirs.draws
    assert difference(ours, theirs) < TOLERANCE


def starts(sampler: str, steps: int) -> tuple[int | None, ...]:
    """None: from noise; and the first steps from an image at strength 0.6 and 1."""
    return (None, steps - int(steps * 0.6), 0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler", SCHEDULER)
def test_agrees_with_diffusers(sampler: str, spacing: str, prediction: str) -> None:
    if sampler in FIXED_SPACING and spacing != "leading":
        pytest.skip("diffusers' scheduler has one fixed spacing")
    config = SchedulerConfig(timestep_spacing=spacing, prediction_type=prediction)
    for steps in STEPS:
        for start in starts(sampler, steps):
            check(build(sampler, steps, config, start=start or 0), case_of(sampler, config, steps, start))


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_ddim_with_noise_agrees_with_diffusers(eta: float, spacing: str) -> None:
    # At eta = 1, rounding makes 1 - P - n^2 negative for some step counts, and diffusers returns NaN (in float32 for 39
    # of 2..100 steps).
    config = SchedulerConfig(timestep_spacing=spacing)
    for steps in STEPS:
        case = case_of("ddim", config, steps, step=(("eta", eta),))
        if not torch.isfinite(reference(case).states[-1]).all():
            assert eta == 1.0
            continue
        check(build("ddim", steps, config, eta=eta), case)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_tcd_with_noise_agrees_with_diffusers(eta: float, prediction: str) -> None:
    config = SchedulerConfig(prediction_type=prediction)
    for steps in (2, 4, 8, 50):
        for start in starts("tcd", steps):
            case = case_of("tcd", config, steps, start, step=(("eta", eta),))
            check(build("tcd", steps, config, start=start or 0, eta=eta), case)


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
    # The first timestep is T - 1. For most betas rounding leaves diffusers' just below, and a cast makes it T - 2.
    solver = sampler in ("dpm++2m", "dpm++2m_sde", "dpm++2s", "unipc")
    first = 999 if schedule == "exponential" and solver else None
    for steps in STEPS:
        for start in (None, steps - int(steps * 0.6)):
            case = case_of(sampler, config, steps, start, extra={f"use_{schedule}_sigmas": True}, first=first)
            check(build(sampler, steps, config, schedule=schedule, start=start or 0), case)


@pytest.mark.parametrize("sampler", ["dpm2", "dpm2_a"])
def test_exponential_levels_of_dpm2_agree_with_diffusers(sampler: str) -> None:
    config = SchedulerConfig()  # with Karras' levels diffusers rounds the timesteps, k-diffusion does not
    for steps in STEPS:
        case = case_of(sampler, config, steps, extra={"use_exponential_sigmas": True})
        check(build(sampler, steps, config, schedule="exponential"), case)


@pytest.mark.parametrize("schedule", ["karras", "exponential"])
@pytest.mark.parametrize("sampler", ["deis", "sa_solver"])
def test_levels_of_exponential_adams_methods_agree_with_diffusers(sampler: str, schedule: str) -> None:
    config = SchedulerConfig()
    first = 999 if schedule == "exponential" else None  # see above
    for steps in STEPS:
        case = case_of(sampler, config, steps, extra={f"use_{schedule}_sigmas": True}, first=first)
        # diffusers' SA-Solver noises the known part of an inpainted image to the rounded timestep's level.
        check(build(sampler, steps, config, schedule=schedule), case, keep=sampler != "sa_solver")


@pytest.mark.parametrize("schedule", ["karras", "exponential"])
def test_euler_a_has_the_levels_of_euler(schedule: str) -> None:
    # diffusers has no such schedules for Euler ancestral; k-diffusion has, with Euler's sigmas.
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
        pytest.skip("epsilon is refused at zero SNR; test_build.py checks that")
    config = SchedulerConfig(timestep_spacing=spacing, prediction_type=prediction, rescale_betas_zero_snr=True)
    for steps in STEPS:
        check(build(sampler, steps, config), case_of(sampler, config, steps))


@pytest.mark.parametrize("betas", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("sampler", SCHEDULER)
def test_other_betas_agree_with_diffusers(sampler: str, betas: str) -> None:
    config = SchedulerConfig(beta_schedule=betas, beta_start=1e-4, beta_end=0.02, prediction_type="v_prediction")
    check(build(sampler, 20, config), case_of(sampler, config, 20))


def test_cosine_karras_timesteps_are_rounded_down() -> None:
    config = SchedulerConfig(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    case = case_of("dpm++2m", config, 20, extra={"use_karras_sigmas": True}, first=999)
    check(build("dpm++2m", 20, config, schedule="karras"), case)


def test_every_sampler_is_compared() -> None:
    others = {"euler_maruyama", "ipndm_v", *REFERENCES} - {
        "dpm++2m_sde_heun"
    }  # see test_euler_maruyama.py and test_solvers.py
    assert set(SAMPLERS) - set(SCHEDULER) == others


@pytest.mark.parametrize("sampler", SCHEDULER)
def test_a_changed_coefficient_is_noticed(sampler: str) -> None:
    """The comparison can fail: a column that is off by 1e-4, or a flag inverted, is far above the tolerance."""
    config = SchedulerConfig(prediction_type="v_prediction", timestep_spacing="leading")
    table, theirs = build(sampler, 5, config), reference(case_of(sampler, config, 5))
    assert difference(run_table(table, False), theirs) < TOLERANCE
    for i, column in enumerate(COLUMNS):
        if not table.rows[:, i].any():
            continue
        # LCM's weight of x is below 1e-7 at every timestep: it gets 1e-4 added.
        rows = table.rows.copy()
        rows[:, i] += np.where(rows[:, i] != 0, 1e-4 * (rows[:, i] if abs(rows[:, i]).max() > 1e-4 else 1), 0)
        assert difference(run_table(replace(table, rows=rows), False), theirs) > 100 * TOLERANCE, column
    for i in range(2):
        keep = table.keep.copy()
        keep[:, i] *= 1 + 1e-4
        assert difference(run_table(replace(table, keep=keep), False), theirs) > 100 * TOLERANCE, "keep"
    used = {"save": table.rows[:, COLUMNS.index("s")].any(), "push": table.rows[:, COLUMNS.index("b1")].any()}
    for flag in (name for name, is_used in used.items() if is_used):
        inverted = run_table(replace(table, **{flag: ~getattr(table, flag)}), False)
        assert difference(inverted, theirs) > 100 * TOLERANCE, flag


# Hyper-SD's one step, Align Your Steps for SD 1.5 (diffusers' AysSchedules), and uneven ones.
LISTS = ((800,), (999, 850, 736, 645, 545, 455, 343, 233, 124, 24), (981, 980, 500, 3, 0))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sampler", ["ddpm", "euler", "heun", "dpm++2m", "dpm++2s", "lcm", "tcd"])
def test_listed_timesteps_agree_with_diffusers(sampler: str, prediction: str) -> None:
    """These are the schedulers whose `set_timesteps` takes `timesteps`."""
    for listed in LISTS:
        for spacing in ("leading", "linspace"):  # only what the noise is scaled by depends on it
            config = SchedulerConfig(timestep_spacing=spacing, prediction_type=prediction)
            for start in (None, len(listed) // 2):
                case = case_of(sampler, config, len(listed), start, timesteps=listed)
                check(build(sampler, len(listed), config, start=start or 0, timesteps=listed), case)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_listed_sigmas_agree_with_diffusers(spacing: str) -> None:
    """Euler's `set_timesteps` takes `sigmas`; these are Align Your Steps for SD 1.5 (diffusers' AysSchedules)."""
    listed = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.0)
    for sigmas in (listed, listed[:-1]):
        config = SchedulerConfig(timestep_spacing=spacing)
        for start in (None, 4):
            case = case_of("euler", config, len(sigmas) - 1, start, sigmas=sigmas)
            check(build("euler", len(sigmas) - 1, config, start=start or 0, sigmas=sigmas), case)
