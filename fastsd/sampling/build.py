"""The table of any sampler, by one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np

from fastsd.config import SPACINGS, SchedulerConfig
from fastsd.errors import FastsdError
from fastsd.sampling.edm import of_v
from fastsd.sampling.k_levels import KLevels
from fastsd.sampling.levels import LEVELS
from fastsd.sampling.samplers import SAMPLERS, Sampler, complete, resolve
from fastsd.sampling.schedule import Schedule
from fastsd.sampling.table import Table


def build(
    sampler: str,
    num_inference_steps: int,
    config: SchedulerConfig,
    *,
    schedule: str = "default",
    spacing: str | None = None,
    start: int = 0,
    eta: float = 0.0,
    levels: KLevels | None = None,
    xl: bool = False,
    timesteps: Sequence[float] = (),
    sigmas: Sequence[float] = (),
) -> Table:
    """The table of a sampler for a checkpoint's noise schedule.

    Args:
        sampler, schedule: as `resolve` takes them.
        num_inference_steps: the user's steps, N.
        config: the checkpoint's noise schedule.
        spacing: of the timesteps; None: the config's, else the sampler's own.
        start: the first of the N steps that runs. A later start has another table, since a multistep method begins
            without a history.
        eta: DDIM's share of fresh noise, 0 to 1.
        levels: another program's noise levels, in place of the spacing's.
        xl: the model is of SDXL's family, for which some schedules have levels of their own.
        timesteps: N whole numbers from high to low, in place of a schedule and a spacing.
        sigmas: N + 1 noise levels from high to low, the last after the last step, in place of both.

    Raises:
        FastsdError: an unknown sampler or schedule, two that do not go together, or a number out of range.
    """
    sampler, schedule = resolve(sampler, schedule)
    entry = SAMPLERS[sampler]
    _check(entry, config, num_inference_steps, schedule, start, eta)
    _check_listed(entry, config, num_inference_steps, schedule, spacing, timesteps, sigmas)
    try:
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            listed = tuple(timesteps or sigmas)
            made = Schedule(complete(config, sampler, spacing), num_inference_steps, start, schedule, eta, None, listed)
            given = levels.of(made, sampler, xl) if levels is not None and entry.takes_schedule else None
            if given is None and schedule in LEVELS:
                given = made.at(LEVELS[schedule](made.sigmas, num_inference_steps, xl))
            given = made.at(sigmas) if sigmas else given
            own = levels.tables.get(sampler) if levels is not None else None
            make = own or entry.make_table
            make = make if config.edm is None else of_v(make)
            return make(made) if given is None or own else _at_levels(make, made, given)
    except (ZeroDivisionError, np.linalg.LinAlgError):
        raise FastsdError(
            f"{num_inference_steps} of {sampler} put two steps on one noise level; take fewer",
            argument="num_inference_steps",
        ) from None


def _check(entry: Sampler, config: SchedulerConfig, steps: int, schedule: str, start: int, eta: float) -> None:
    """Refuse a number out of range, or what the sampler does not take."""
    sampler, total = entry.name, config.num_train_timesteps
    if not 1 <= steps <= total:
        raise FastsdError(f"takes 1 to {total}, not {steps}", argument="num_inference_steps")
    if not 0 <= start < steps:
        raise FastsdError(f"takes 0 to {steps - 1} for {steps} steps, not {start}", argument="start")
    if not 0 <= eta <= 1:
        raise FastsdError(f"takes 0 to 1, not {eta}", argument="eta")
    if eta > 0 and not entry.takes_eta:
        users = " and ".join(other.name for other in SAMPLERS.values() if other.takes_eta)
        raise FastsdError(f"only {users} use it, not {sampler}; leave it at 0", argument="eta")
    if schedule != "default" and not entry.takes_schedule:
        others = ", ".join(other.name for other in SAMPLERS.values() if other.takes_schedule)
        raise FastsdError(f"{sampler} has no {schedule} schedule; use default, or one of {others}", argument="schedule")
    if config.edm is not None and (not entry.takes_schedule or sampler == "sa_solver"):
        raise FastsdError(
            f"{sampler} steps from one training timestep to another, and an EDM model has none; use euler or dpm++2m",
            argument="sampler",
        )


def _check_listed(
    entry: Sampler,
    config: SchedulerConfig,
    steps: int,
    schedule: str,
    spacing: str | None,
    timesteps: Sequence[float],
    sigmas: Sequence[float],
) -> None:
    """Refuse timesteps or sigmas that the run cannot have."""
    if not (timesteps or sigmas):
        return
    name, count = ("timesteps", len(timesteps)) if timesteps else ("sigmas", len(sigmas) - 1)
    total = config.num_train_timesteps
    if timesteps and timesteps[0] >= total and config.edm is None:
        raise FastsdError(f"the model has the timesteps 0 to {total - 1}", argument=name, value=int(timesteps[0]))
    if not entry.takes_levels or (sigmas and not entry.takes_schedule):
        raise FastsdError(f"{entry.name} spaces its own steps; use euler, dpm++2m or unipc", argument=name)
    if count != steps:
        raise FastsdError(f"the {name} are those of {count} steps, not of {steps}", argument="num_inference_steps")
    if schedule != "default" or spacing is not None:
        other = "schedule" if schedule != "default" else "spacing"
        raise FastsdError(f"the {name} say where the steps are; leave it out", argument=other)
    if timesteps and config.edm is not None:
        raise FastsdError("an EDM model has no training timesteps; give {sigmas}", argument=name)


def _at_levels(
    make_table: Callable[[Schedule], Table], made: Schedule, given: tuple[list[float], list[float]]
) -> Table:
    """The table at `given` timesteps and sigmas.

    Where they are not N, the user's N steps stay: more levels belong to the last step, missing ones to the first. A
    start counts from the first level, or from the last where levels are missing.
    """
    missing = max(made.num_inference_steps - len(given[0]), 0)
    table = make_table(replace(made, start=max(made.start - missing, 0), given=given))
    return replace(table, step=np.minimum(table.step + missing, made.num_inference_steps - 1))


@lru_cache(maxsize=128)
def spacing_counts(sampler: str, schedule: str, config: SchedulerConfig) -> bool:
    """Whether the spacing of the timesteps changes a run. LCM, for one, has timesteps of its own.

    Args:
        sampler, schedule, config: as `build` takes them; the names are in their registries.
    """
    steps = min(5, config.num_train_timesteps)
    found: set[str | bytes] = set()
    for spacing in SPACINGS:
        try:
            table = build(sampler, steps, config, schedule=schedule, spacing=spacing)
        except FastsdError as error:
            found.add(str(error))
        else:
            found.add(table.rows.tobytes() + np.array([table.init, *table.mix]).tobytes())
    return len(found) > 1
