"""The sampler's table of a pass: which steps of which schedule run, by the rules of the program that is followed."""

from __future__ import annotations

import math
from dataclasses import replace

from fastsd.config import SchedulerConfig
from fastsd.errors import FastsdError
from fastsd.generate.like import LIKE
from fastsd.parameters import Settings
from fastsd.sampling.build import build
from fastsd.sampling.samplers import resolve
from fastsd.sampling.table import Table


def make_table(settings: Settings, scheduler: SchedulerConfig, total: int, run: int, xl: bool = False) -> Table:
    """The sampler's table for the last `run` of `total` steps; without rows where none runs."""
    rules, start = LIKE[settings.like], total - run
    last = min(start, total - 1)
    listed = {name: numbers_of(settings[name]) for name in ("timesteps", "sigmas")}
    for name, numbers in listed.items():
        if numbers and len(numbers) - (name == "sigmas") != total:
            raise FastsdError(
                f"{{like}} {settings.like} takes the last {run} of {total} steps for this strength; leave it out",
                argument=name,
                value=settings[name],
            )
    follows = rules.levels is not None and settings.spacing in (None, rules.levels.spacing(settings.sampler))
    table = build(
        settings.sampler,
        total,
        scheduler,
        start=last,
        schedule=settings.schedule,
        spacing=settings.spacing,
        eta=settings.eta,
        levels=rules.levels if follows and not any(listed.values()) else None,
        xl=xl,
        **listed,
    )
    if start != last:
        return table.without_rows()
    if rules.starts_at_sigma is None or rules.leaves_start(settings.sampler):
        return table
    signal, noise = table.mix  # at the first noise level
    if rules.starts_at_sigma:
        return replace(table, init=noise)
    unit = math.hypot(signal, noise)
    return replace(table, init=unit, mix=(signal, unit)) if start == 0 else table


def numbers_of(text: str | None) -> tuple[float, ...]:
    """The numbers of a `Descending` parameter."""
    return tuple(float(part) for part in text.split(",")) if text else ()


def listed_steps(settings: Settings) -> int | None:
    """How many steps the caller's timesteps or sigmas are; None where there are none.

    Raises:
        FastsdError: other parameters count the steps or place them in another way.
    """
    name = "timesteps" if settings.timesteps else "sigmas"
    if settings[name] is None:
        return None
    count = len(numbers_of(settings[name])) - (name == "sigmas")
    for other in ("num_inference_steps", "hires_steps"):
        if settings[other] not in (None, count):
            raise FastsdError(
                f"{{{name}}} are those of {count} steps; leave it out", argument=other, value=settings[other]
            )
    placed = {"spacing": settings.spacing, "schedule": settings.schedule}
    if placed["schedule"] is not None and resolve("euler", placed["schedule"])[1] == "default":
        del placed["schedule"]
    for other, value in placed.items():
        if value is not None:
            raise FastsdError(f"{{{name}}} say where the steps are; leave it out", argument=other, value=value)
    return count


def refiner_row(table: Table, scheduler: SchedulerConfig, switch: float | None) -> int:
    """The first row of the table that the refiner does; past the last where there is none.

    It takes over at the first step whose timestep lies below the share of them that `switch` leaves, as diffusers
    counts it.
    """
    times, steps = table.timesteps, table.step
    if switch is None:
        return len(times)
    if scheduler.edm is not None:  # its levels have no timesteps; the share is of the steps
        first = round((int(steps[-1]) + 1) * switch) if len(steps) else 0
        return next((row for row in range(len(steps)) if steps[row] >= first), len(times))
    below = round(scheduler.num_train_timesteps * (1.0 - switch))
    starts = (row for row in range(len(times)) if row == 0 or steps[row] != steps[row - 1])
    return next((row for row in starts if times[row] < below), len(times))
