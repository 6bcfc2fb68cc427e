"""What the samplers in the notation of Karras et al. 2022, x = image + sigma z, build their tables from."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from fastsd.sampling.schedule import Schedule
from fastsd.sampling.table import TableBuilder, TableRow, karras_c_in, karras_prediction


def ancestral(sigma_from: float, sigma_to: float) -> tuple[float, float]:
    """(sigma_down, sigma_up) of an ancestral step: down^2 + up^2 = to^2, up^2 = to^2 (from^2 - to^2) / from^2."""
    up = min(sigma_to, sigma_to * math.sqrt(1 - (sigma_to / sigma_from) ** 2))
    return math.sqrt(sigma_to**2 - up**2), up


def builder_of(schedule: Schedule, sigmas: list[float]) -> TableBuilder:
    """An empty table that starts at `sigmas[schedule.start]`, from an image or from noise."""
    # In "leading" spacing the run starts below the last timestep. There diffusers scales the noise to the standard
    # deviation of a noisy image of unit variance, as for EDM models; elsewhere to sigma.
    spaced = schedule.schedule != "sgm_uniform" and (schedule.given is None or bool(schedule.listed))
    leading = spaced and schedule.config.timestep_spacing == "leading"
    init = math.sqrt(sigmas[0] ** 2 + 1) if leading or schedule.config.edm is not None else sigmas[0]
    return TableBuilder(mix=(1.0, sigmas[schedule.start]), init=init)


def row(
    schedule: Schedule,
    t: float,
    sigma: float,
    step: int,
    sigma_after: float,
    *,
    a: float = 0.0,
    s: float = 0.0,
    b: list[float],
    n: float = 0.0,
    m: float = 0.0,
    save: bool = False,
    draw: bool = False,
) -> TableRow:
    """A row that calls the network at (t, sigma), with the clean image as D."""
    prediction = karras_prediction(schedule.config.prediction_type, sigma)
    return TableRow(t, prediction, step, (1.0, sigma_after), karras_c_in(sigma), a, s, b, n, m, save, True, draw)


def slope_row(
    schedule: Schedule,
    t: float,
    sigma: float,
    step: int,
    sigma_after: float,
    *,
    b: list[float],
    a: float = 0.0,
    s: float = 0.0,
    save: bool = False,
) -> TableRow:
    """A row that calls the network at (t, sigma), with the slope dx/dsigma = (x - image) / sigma as D."""
    p, q = karras_prediction(schedule.config.prediction_type, sigma)
    prediction = ((1 - p) / sigma, -q / sigma)
    return TableRow(t, prediction, step, (1.0, sigma_after), karras_c_in(sigma), a, s, b, save=save)


def inner_steps(
    builder: TableBuilder, schedule: Schedule, times: list[float], sigmas: list[float]
) -> Iterator[tuple[int, float, float]]:
    """(i, S, S_next) of each step that ends above sigma 0. The step to 0 is added here: its result is D."""
    for i in range(schedule.start, len(times)):
        S, S_next = sigmas[i], sigmas[i + 1]
        if S_next == 0:
            builder.add(row(schedule, times[i], S, i, S_next, b=[1.0]))
        else:
            yield i, S, S_next


def next_time(schedule: Schedule, times: list[float], i: int, sigma: float) -> float:
    """The timestep after the i-th, at `sigma`: the next listed one, or that of a last level above 0."""
    return times[i + 1] if i + 1 < len(times) else time_of(schedule, sigma)


def time_of(schedule: Schedule, sigma: float) -> float:
    """The timestep of a level that the schedule does not list; not a whole number."""
    return float(schedule.timestep_of(np.array([sigma]))[0])
