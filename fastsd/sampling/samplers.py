"""The one call that builds the table of any sampler."""

from __future__ import annotations

import importlib

import numpy as np

from fastsd.config import SchedulerConfig
from fastsd.errors import FastsdError
from fastsd.sampling.names import SAMPLERS, SCHEDULES, resolve
from fastsd.sampling.schedule import Schedule
from fastsd.sampling.table import COLUMNS, Table

__all__ = ["COLUMNS", "SAMPLERS", "SCHEDULES", "Table", "build", "resolve"]


def build(
    sampler: str,
    num_inference_steps: int,
    config: SchedulerConfig,
    *,
    schedule: str = "default",
    start: int = 0,
    eta: float = 0.0,
) -> Table:
    """The table of a sampler for a checkpoint's noise schedule.

    Args:
        sampler, schedule: names in `SAMPLERS` and `SCHEDULES`; `resolve` turns others into these.
        num_inference_steps: the user's steps.
        config: the checkpoint's.
        start: the first of the steps that runs. A table that starts later is not a part of another, because multistep
            methods have no history there.
        eta: DDIM's share of fresh noise, 0 to 1.

    Raises:
        FastsdError: an unknown sampler or schedule, two that do not go together, or a number out of range.
    """
    row = SAMPLERS.get(sampler)
    if row is None:
        raise FastsdError(f"{sampler!r} is unknown; fastsd knows {', '.join(SAMPLERS)}", argument="sampler")
    if schedule not in SCHEDULES:
        raise FastsdError(f"{schedule!r} is unknown; fastsd knows {', '.join(SCHEDULES)}", argument="schedule")
    total = config.num_train_timesteps
    if not 1 <= num_inference_steps <= total:
        raise FastsdError(f"takes 1 to {total}, not {num_inference_steps}", argument="num_inference_steps")
    if not 0 <= start < num_inference_steps:
        last = num_inference_steps - 1
        raise FastsdError(f"takes 0 to {last} for {num_inference_steps} steps, not {start}", argument="start")
    if not 0 <= eta <= 1:
        raise FastsdError(f"takes 0 to 1, not {eta}", argument="eta")
    if eta > 0 and sampler != "ddim":
        raise FastsdError(f"only ddim uses it, not {sampler}; leave it at 0", argument="eta")
    if schedule != "default" and not row.schedules:
        others = ", ".join(other.name for other in SAMPLERS.values() if other.schedules)
        raise FastsdError(f"{sampler} has no {schedule} schedule; use default, or one of {others}", argument="schedule")
    module, _, function = row.function.partition(":")
    make = getattr(importlib.import_module(f"fastsd.sampling.{module}"), function)
    try:
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            return make(Schedule(config, num_inference_steps, start, schedule, eta))
    except ZeroDivisionError:
        raise FastsdError(
            f"{num_inference_steps} of {sampler} put two steps on one noise level; take fewer",
            argument="num_inference_steps",
        ) from None
