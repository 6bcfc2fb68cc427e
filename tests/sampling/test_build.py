"""Refusals, and the form of every table."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsd.config import SchedulerConfig
from fastsd.errors import FastsdError
from fastsd.sampling import advance
from fastsd.sampling.build import build
from fastsd.sampling.samplers import SAMPLERS, SCHEDULES
from fastsd.sampling.table import COLUMNS, Table

CONFIG = SchedulerConfig()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sampler": "ddim", "schedule": "karras"}, "schedule: ddim has no karras schedule; use default"),
        ({"sampler": "ddim karras"}, "schedule: ddim has no karras schedule"),
        ({"num_inference_steps": 0}, "num_inference_steps: takes 1 to 1000, not 0"),
        ({"num_inference_steps": 1001}, "num_inference_steps: takes 1 to 1000, not 1001"),
        ({"sampler": "lcm", "num_inference_steps": 51}, "num_inference_steps: lcm takes 1 to 50, not 51"),
        ({"sampler": "dpm++2m", "num_inference_steps": 1000}, "num_inference_steps: 1000 of dpm[+][+]2m put two steps"),
        ({"start": 20}, "start: takes 0 to 19 for 20 steps, not 20"),
        ({"sampler": "ddim", "eta": 1.5}, "eta: takes 0 to 1"),
        ({"sampler": "euler", "eta": 0.5}, "eta: only ddim and tcd uses? it, not euler"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(arguments: dict, message: str) -> None:
    arguments = {"sampler": "euler", "num_inference_steps": 20, **arguments}
    with pytest.raises(FastsdError, match=message) as caught:
        build(config=CONFIG, **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "lcm"])
def test_epsilon_is_refused_at_zero_terminal_snr(sampler: str) -> None:
    zero = replace(CONFIG, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    with pytest.raises(FastsdError, match="prediction_type: epsilon cannot start from zero terminal SNR"):
        build(sampler, 20, zero)


@pytest.mark.parametrize("sampler", ["pndm", "euler_maruyama"])
def test_samplers_that_cannot_start_from_zero_terminal_snr_refuse_it(sampler: str) -> None:
    zero = replace(CONFIG, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    with pytest.raises(FastsdError, match=f"sampler: {sampler} cannot start from zero terminal SNR"):
        build(sampler, 20, zero)


@pytest.mark.parametrize("field", ["prediction_type", "timestep_spacing", "beta_schedule"])
@pytest.mark.parametrize("sampler", ["euler", "ddim", "pndm", "unipc"])
def test_an_unknown_config_value_is_named(sampler: str, field: str) -> None:
    with pytest.raises(FastsdError, match=f"{field}: 'other' is unknown"):
        build(sampler, 20, replace(CONFIG, **{field: "other"}))


# But for the last step.
TWICE = ("heun", "dpm++sde", "dpm2", "dpm2_a", "dpm++2s_a", "seeds_2", "exp_heun", "exp_heun_sde")


def calls(sampler: str, steps: int, start: int, table: Table) -> int:
    """How often the network is called in the steps from `start` on."""
    count = steps - start
    if sampler == "restart":  # every step to 0 is one call: x' is the clean image
        a, s = COLUMNS.index("a"), COLUMNS.index("s")
        return 2 * count - int((table.rows[:, [a, s]] == 0).all(axis=1).sum())
    if sampler in TWICE:
        return 2 * count - 1
    if sampler == "seeds_3":
        return 3 * count - 2
    if sampler == "heun++":  # once in the last step, twice in the one before it
        return max(3 * count - 3, 1)
    return count + (sampler == "pndm" and steps > 1)


@settings(max_examples=150, deadline=None)
@given(
    sampler=st.sampled_from(sorted(SAMPLERS)),
    steps=st.integers(1, 50),
    schedule=st.sampled_from(sorted(set(SCHEDULES) - {"sd_turbo"})),  # it takes 10 steps at most
    spacing=st.sampled_from(["leading", "trailing", "linspace"]),
    prediction=st.sampled_from(["epsilon", "v_prediction", "sample"]),
    data=st.data(),
)
def test_every_table_is_well_formed(
    sampler: str, steps: int, schedule: str, spacing: str, prediction: str, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, steps - 1))
    schedule = schedule if SAMPLERS[sampler].takes_schedule else "default"
    config = replace(CONFIG, timestep_spacing=spacing, prediction_type=prediction)
    table = build(sampler, steps, config, schedule=schedule, start=start)
    count = len(table)
    assert table.rows.shape == (count, len(COLUMNS)) and np.isfinite(table.rows).all()
    assert {len(a) for a in (table.save, table.push, table.draw, table.keep, table.step)} == {count}
    if schedule not in ("ddim_uniform", "beta_comfy", "kl_optimal"):  # other counts of levels, or a last one above 0
        assert count == calls(sampler, steps, start, table)
    assert ((0 <= table.timesteps) & (table.timesteps <= 999)).all()
    assert (table.step[0], table.step[-1]) == (start, steps - 1) and (np.diff(table.step) >= 0).all()
    if sampler not in ("heun++", "restart"):  # they look ahead, or go back up
        assert (np.diff(table.keep[:, 1] / table.keep[:, 0]) <= 0).all()  # never noisier than before
    if sampler == "restart":
        assert table.draw[1:][np.diff(table.keep[:, 1]) > 0].all()  # never noisier than before without fresh noise
    assert tuple(table.keep[-1]) == (1, 0)
    assert not table.rows[~table.draw, 10].any()  # rows without fresh noise have no weight for it


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_a_network_that_predicts_the_image_perfectly_ends_at_it(sampler: str) -> None:
    table = build(sampler, 20, replace(CONFIG, prediction_type="sample", set_alpha_to_one=True))
    generator = torch.Generator().manual_seed(0)
    image, noise = (torch.randn(1, 4, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    state = advance.begin(table, noise)
    while not state.done:
        advance.step(state, image, noise_i=torch.zeros_like(noise))
    # LCM keeps c_skip (6e-8) of x; Euler-Maruyama's last row x' = (1 + B / 2 - B / (1 - A)) x + ... is not exact.
    # Some end at the level of timestep 0, where sigma is 0.03, and the noise is below 4.
    tolerance = {"lcm": 1e-6, "euler_maruyama": 2e-3}.get(sampler, 1e-10)
    tolerance = 0.03 if sampler in ("deis", "dpm_fast", "sa_solver", "tcd") else tolerance
    assert (state.x - image).abs().max() < tolerance * 4
