"""Noise levels by which samplers and schedules are drawn."""

from __future__ import annotations

import numpy as np
import pytest

from fastsd.config import SchedulerConfig
from fastsd.sampling.build import build
from fastsd.sampling.samplers import complete
from fastsd.sampling.schedule import Schedule, alphas_cumprod
from fastsd.show.forward import decibels
from fastsd.show.schedule import sigmas_of


def test_levels_are_those_of_the_schedule() -> None:
    config = SchedulerConfig()
    found = sigmas_of(config, build("euler", 8, config, schedule="karras"))
    levels = Schedule(complete(config, "euler"), 8, schedule="karras").karras_levels()[1]
    # Timesteps are stored in the table in float64; log sigma is interpolated both ways.
    np.testing.assert_allclose(found, levels[:-1], rtol=1e-9)


def test_decibels() -> None:
    assert decibels(0.5) == "0.0 dB" and decibels(0) == "0 (no signal)"
    assert decibels(float(alphas_cumprod(SchedulerConfig())[0])) == pytest.approx("30.7 dB")
