"""Named noise levels against the functions of A1111, Forge and ComfyUI, which are stated here by their formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from fastsd.config import SchedulerConfig
from fastsd.errors import FastsdError
from fastsd.generate.like import LIKE
from fastsd.sampling.build import build
from fastsd.sampling.levels import LEVELS, beta_quantiles
from fastsd.sampling.samplers import SAMPLERS, SCHEDULES
from fastsd.sampling.schedule import RAMPS, Schedule
from fastsd.sampling.table import COLUMNS
from tests.support.lifted import Case, difference, reference, run_table

# numpy warns about diffusers' own __array__.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")
CONFIG = SchedulerConfig(timestep_spacing="linspace")
SIGMAS = Schedule(CONFIG, 1).sigmas
TOP, BOTTOM = float(SIGMAS[-1]), float(SIGMAS[0])
COUNTS = (1, 2, 3, 5, 8, 10, 11, 20, 30, 37, 50, 100)
# Each value is a few roundings of a power or a tangent; tan amplifies them by its argument's distance to pi / 2.
ROUNDING = 1e-12


def levels(name: str, steps: int, xl: bool = False) -> np.ndarray:
    return np.array(LEVELS[name](SIGMAS, steps, xl))


def sigma_at(t: float) -> float:
    """k-diffusion's `DiscreteSchedule.t_to_sigma`: log sigma between two whole timesteps."""
    low, high = math.floor(t), math.ceil(t)
    w = t - low
    return math.exp((1 - w) * math.log(SIGMAS[low]) + w * math.log(SIGMAS[high]))


def linear_quadratic(steps: int) -> list[float]:
    """genmo/mochi's `linear_quadratic_schedule` with a threshold of 0.025, as ComfyUI has it."""
    if steps == 1:
        return [1.0, 0.0]
    first = steps // 2
    rest = steps - first
    gap = first - 0.025 * steps
    square, const = gap / (first * rest**2), gap / (first * rest**2) * first**2
    slope = 0.025 / first - 2 * gap / rest**2
    early = [i * 0.025 / first for i in range(first)]
    return [1 - x for x in (*early, *(square * i * i + slope * i + const for i in range(first, steps)), 1.0)]


EXPECTED = {
    "normal": lambda n: [*(sigma_at(t) for t in np.linspace(999, 0, n)), 0],
    "simple": lambda n: [*(SIGMAS[-(1 + int(i * 1000 / n))] for i in range(n)), 0],
    "ddim_uniform": lambda n: [*(SIGMAS[k] for k in reversed(range(1, 1000, 1000 // n))), 0],
    "kl_optimal": lambda n: [math.tan(i / n * math.atan(BOTTOM) + (1 - i / n) * math.atan(TOP)) for i in range(n + 1)],
    "kl_optimal_comfy": lambda n: [
        *(math.tan(i / (n - 1) * math.atan(BOTTOM) + (1 - i / (n - 1)) * math.atan(TOP)) for i in range(n)),
        0,
    ],
    "linear_quadratic": lambda n: [TOP * x for x in linear_quadratic(n)],
    "turbo": lambda n: [*(SIGMAS[min(max(round(k * 1000.0 / n - 1), 0), 999)] for k in range(n, 0, -1)), 0],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_levels_are_those_of_the_program(name: str) -> None:
    for steps in COUNTS:
        if name == "kl_optimal_comfy" and steps == 1:
            continue  # 0 / 0 there; here the first level
        np.testing.assert_allclose(levels(name, steps), EXPECTED[name](steps), rtol=ROUNDING, atol=1e-14)


def test_beta_quantiles_are_scipys() -> None:
    p = np.concatenate([np.linspace(0, 1, 401), np.logspace(-12, -1, 50)])
    np.testing.assert_allclose(beta_quantiles(p), scipy.stats.beta.ppf(p, 0.6, 0.6), rtol=1e-10, atol=1e-15)


def test_beta_is_a1111s_and_beta_comfy_comfyuis() -> None:
    for steps in COUNTS:
        ramp = [BOTTOM + x * (TOP - BOTTOM) for x in scipy.stats.beta.ppf(1 - np.linspace(0, 1, steps), 0.6, 0.6)]
        _, ours = Schedule(CONFIG, steps, schedule="beta").karras_levels()
        if steps > 1:  # one timestep in linspace spacing is 0, as in diffusers
            np.testing.assert_allclose(ours, [*ramp, 0], rtol=1e-10)
        times = np.rint(scipy.stats.beta.ppf(1 - np.linspace(0, 1, steps, endpoint=False), 0.6, 0.6) * 999)
        kept = [t for i, t in enumerate(times) if i == 0 or t != times[i - 1]]
        np.testing.assert_array_equal(levels("beta_comfy", steps), [*(SIGMAS[int(t)] for t in kept), 0])


@pytest.mark.parametrize("sampler", ["euler", "dpm2", "dpm++2m", "unipc", "deis"])
def test_beta_agrees_with_diffusers(sampler: str) -> None:
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    for steps in (5, 20):
        arguments = betas | {"use_beta_sigmas": True, "timestep_spacing": "linspace"}
        case = Case(SAMPLERS[sampler].diffusers, steps, tuple(arguments.items()))
        # Quantiles of both are exact to 1e-10, and the first sigma's timestep is 999 or just below, cast to int.
        theirs, ours = reference(case), run_table(build(sampler, steps, CONFIG, schedule="beta"), False)
        assert difference(ours, theirs) < 1e-7


def test_align_your_steps_are_the_published_levels() -> None:
    """https://research.nvidia.com/labs/toronto-ai/AlignYourSteps/howto.html, and 0, as A1111 adds it."""
    sd = [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029]
    xl = [14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029]
    for published, is_xl in ((sd, False), (xl, True)):
        assert levels("align_your_steps", 11, is_xl).tolist() == [*published, 0]
        for steps in (2, 10, 20, 37):
            ascending = np.interp(np.linspace(0, 1, steps), np.linspace(0, 1, 11), np.log(published[::-1]))
            expected = [*np.exp(ascending)[::-1], 0]
            np.testing.assert_allclose(levels("align_your_steps", steps, is_xl), expected, rtol=ROUNDING)
    assert levels("align_your_steps", 1).tolist() == [14.615, 0]


@pytest.mark.parametrize("name", ["align_your_steps_32", "align_your_steps_gits"])
def test_other_published_levels_fall_and_differ_by_family(name: str) -> None:
    count = 32 if name.endswith("32") else 11
    for xl in (False, True):
        values = levels(name, count, xl)
        assert len(values) == count + 1 and (np.diff(values) < 0).all() and (values[0], values[-1]) == (14.615, 0)
    assert levels(name, count, False)[1] != levels(name, count, True)[1]


def test_the_family_reaches_the_table() -> None:
    tables = [build("euler", 11, CONFIG, schedule="align_your_steps", xl=xl) for xl in (False, True)]
    assert tables[0].keep[0, 1] == 6.475 and tables[1].keep[0, 1] == 6.315


def test_sd_turbo_takes_the_first_of_ten_levels() -> None:
    """ComfyUI's node SDTurboScheduler: timesteps 999, 899, ... and no more than ten."""
    assert levels("sd_turbo", 2).tolist() == [SIGMAS[999], SIGMAS[899], 0]
    with pytest.raises(FastsdError, match="num_inference_steps: the schedule sd_turbo takes 1 to 10, not 11"):
        build("euler", 11, CONFIG, schedule="sd_turbo")


def test_every_schedule_is_tested_here_or_a_spacing() -> None:
    others = {"beta_comfy", "sd_turbo", "align_your_steps", "align_your_steps_32", "align_your_steps_gits"}
    assert set(LEVELS) == {*EXPECTED, *others}
    assert set(SCHEDULES) == {"default", "sgm_uniform", *RAMPS, *LEVELS}


def test_levels_that_are_not_n_leave_the_users_steps() -> None:
    """Levels too many belong to the last step; missing ones to the first."""
    many = build("euler", 30, CONFIG, schedule="ddim_uniform")
    assert len(many) == 31 and many.steps == 30 and many.step[-2:].tolist() == [29, 29]
    late = build("euler", 30, CONFIG, schedule="ddim_uniform", start=10)
    assert len(late) == 21 and (late.step[0], late.step[-1]) == (10, 29)
    few = build("euler", 200, CONFIG, schedule="beta_comfy")
    assert len(few) < 200 and (few.step[0], few.step[-1]) == (200 - len(few), 199)
    assert len(build("euler", 200, CONFIG, schedule="beta_comfy", start=190)) == 10
    assert len(build("euler", 200, CONFIG, schedule="beta_comfy", start=1)) == len(few)


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm++2m", "unipc", "exp_heun", "lms", "dpm++sde"])
def test_kl_optimal_ends_at_the_smallest_level(sampler: str) -> None:
    """A1111's `kl_optimal` appends no 0. Heun's method then has its second call in the last step too."""
    table = build(sampler, 10, CONFIG, schedule="kl_optimal")
    assert len(table) == (20 if sampler in ("heun", "exp_heun", "dpm++sde") else 10)
    assert np.isfinite(table.rows).all() and table.timesteps[-1] < 150


@pytest.mark.parametrize("schedule", ["karras", "exponential"])
def test_ramps_span_all_training_levels_as_in_a1111(schedule: str) -> None:
    """A1111 spans the model's sigma_min to sigma_max; so do these, with the spacing that Euler has of its own."""
    _, sigmas = Schedule(CONFIG, 20, schedule=schedule).karras_levels()
    ramp = np.linspace(0, 1, 20)
    if schedule == "karras":
        expected = (TOP ** (1 / 7) + ramp * (BOTTOM ** (1 / 7) - TOP ** (1 / 7))) ** 7
    else:
        expected = np.exp(math.log(TOP) + ramp * (math.log(BOTTOM) - math.log(TOP)))
    np.testing.assert_allclose(sigmas, [*expected, 0], rtol=ROUNDING)


def test_comfyuis_rules_take_its_own_beta_and_kl_optimal() -> None:
    """ComfyUI's `beta_scheduler` and `kl_optimal_scheduler` differ from A1111's of the same names."""
    for name in ("beta", "kl_optimal"):
        _, comfy = LIKE["comfy"].levels.of(Schedule(CONFIG, 10, schedule=name), "euler", False)
        np.testing.assert_array_equal(comfy, levels(f"{name}_comfy", 10))
        _, a1111 = LIKE["a1111"].levels.of(Schedule(CONFIG, 10, schedule=name), "euler", False)
        assert a1111 != comfy


def test_a1111_leaves_out_the_last_level_but_one_of_dpm2() -> None:
    """`discard_next_to_last_sigma` in modules/sd_samplers_kdiffusion.py, for any schedule."""
    _, sigmas = LIKE["a1111"].levels.of(Schedule(CONFIG, 10, schedule="simple"), "dpm2", False)
    whole = levels("simple", 11)
    np.testing.assert_array_equal(sigmas, [*whole[:-2], 0])


@pytest.mark.parametrize("sampler", ["dpm++2m", "dpm++2m_sde"])
def test_a_last_step_above_0_keeps_its_order(sampler: str) -> None:
    """k-diffusion's `sample_dpmpp_2m` takes order 1 only where the next sigma is 0; diffusers in few steps anyway."""
    last = build(sampler, 5, CONFIG, schedule="kl_optimal").rows[-1]
    assert last[COLUMNS.index("b1")] != 0
    assert build(sampler, 5, CONFIG, schedule="kl_optimal_comfy").rows[-1][COLUMNS.index("b1")] == 0
