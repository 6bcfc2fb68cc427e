"""Every sampler by its name, and the one call that builds a table."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable

import numpy as np

from fastsd.config import SchedulerConfig
from fastsd.errors import FastsdError
from fastsd.sampling.dpm_solver import dpmpp_2m, dpmpp_2m_sde, dpmpp_2s
from fastsd.sampling.karras import dpmpp_sde, euler, euler_a, heun, lms
from fastsd.sampling.schedule import SCHEDULES, Schedule
from fastsd.sampling.table import COLUMNS, Table
from fastsd.sampling.unipc import unipc
from fastsd.sampling.vp import ddim, ddpm, euler_maruyama, lcm, pndm

__all__ = ["ALIASES", "COLUMNS", "SAMPLERS", "SCHEDULES", "Table", "build", "resolve"]

SAMPLERS: dict[str, Callable[[Schedule], Table]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "pndm": pndm,
    "euler": euler,
    "euler_a": euler_a,
    "heun": heun,
    "dpm++2m": dpmpp_2m,
    "dpm++2m_sde": dpmpp_2m_sde,
    "dpm++sde": dpmpp_sde,
    "dpm++2s": dpmpp_2s,
    "unipc": unipc,
    "lms": lms,
    "lcm": lcm,
    "euler_maruyama": euler_maruyama,
}

# Samplers of the discrete process step through its own timesteps; they have no sigmas that could be moved.
FIXED_SCHEDULE = ("ddpm", "ddim", "pndm", "lcm", "euler_maruyama")

# What else users call them, keyed by `_key` (case, spaces, "_", "-", a leading "k_" and "pp" for "++" do not matter,
# so "DPM++ 2M", "dpmpp_2m" and "k_dpmpp_2m" need no entry).
ALIASES = {
    "plms": "pndm",
    "eulerancestral": "euler_a",
    "eulermaruyamasde": "euler_maruyama",
    "em": "euler_maruyama",
    "dpmpp": "dpm++2m",
    "dpmsolverpp": "dpm++2m",
    "dpmsolvermultistep": "dpm++2m",
    "dpmppsde2m": "dpm++2m_sde",
    "dpmsolversde": "dpm++sde",
    "dpmsolversinglestep": "dpm++2s",
    "unipcmultistep": "unipc",
    "unipcbh2": "unipc",
    "eulerdiscrete": "euler",
    "eulerancestraldiscrete": "euler_a",
    "heundiscrete": "heun",
    "lmsdiscrete": "lms",
}


def build(
    sampler: str,
    num_inference_steps: int,
    config: SchedulerConfig,
    *,
    schedule: str = "default",
    start: int = 0,
    eta: float = 0.0,
) -> Table:
    """The table of `sampler` (a name or an alias, see `resolve`) for a checkpoint's noise schedule.

    start: the first of the user's steps that runs; a table that starts later is built anew, as multistep methods have
    no history there. eta: DDIM's stochasticity, 0 to 1.

    Raises:
        FastsdError: an unknown sampler or schedule, one that does not fit the other, or a number out of range.
    """
    sampler, schedule = resolve(sampler, schedule)
    total = config.num_train_timesteps
    if not 1 <= num_inference_steps <= total:
        raise FastsdError(f"takes 1 to {total}, not {num_inference_steps}", argument="num_inference_steps")
    if not 0 <= start < num_inference_steps:
        raise FastsdError(
            f"takes 0 to {num_inference_steps - 1} for {num_inference_steps} steps, not {start}", argument="start"
        )
    if not 0 <= eta <= 1:
        raise FastsdError(f"takes 0 to 1, not {eta}", argument="eta")
    if eta > 0 and sampler != "ddim":
        raise FastsdError(f"only ddim uses it, not {sampler}; leave it at 0", argument="eta")
    if schedule != "default" and sampler in FIXED_SCHEDULE:
        others = ", ".join(name for name in SAMPLERS if name not in FIXED_SCHEDULE)
        raise FastsdError(f"{sampler} has no {schedule} schedule; use default, or one of {others}", argument="schedule")
    try:
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            return SAMPLERS[sampler](Schedule(config, num_inference_steps, start, schedule, eta))
    except ZeroDivisionError:
        raise FastsdError(
            f"{num_inference_steps} of {sampler} put two steps on one noise level; take fewer",
            argument="num_inference_steps",
        ) from None


def resolve(sampler: str, schedule: str = "default") -> tuple[str, str]:
    """The names in `SAMPLERS` and `SCHEDULES` that a user means.

    A1111's and k-diffusion's spellings and diffusers' class names are known. A schedule at the end of the sampler's
    name ("DPM++ 2M Karras") counts where `schedule` is "default".

    Raises:
        FastsdError: an unknown name, with the nearest ones.
    """
    key = _key(sampler)
    schedules = {_key(name): name for name in SCHEDULES}
    wanted = schedules.get(_key(schedule))
    if wanted is None:
        raise FastsdError(f"{schedule!r} is unknown; fastsd knows {', '.join(SCHEDULES)}", argument="schedule")
    known = {_key(name): name for name in SAMPLERS} | ALIASES
    for suffix, name in schedules.items():
        if key not in known and key.endswith(suffix) and key.removesuffix(suffix) in known:
            key, wanted = key.removesuffix(suffix), name if wanted == "default" else wanted
    if key not in known:
        near = dict.fromkeys(known[match] for match in difflib.get_close_matches(key, known, n=4, cutoff=0.5))
        offer = f"did you mean {' or '.join(near)}?" if near else f"fastsd knows {', '.join(SAMPLERS)}"
        raise FastsdError(f"{sampler!r} is unknown; {offer}", argument="sampler")
    return known[key], wanted


def _key(name: str) -> str:
    """`name` without case, separators, a leading "k_" and diffusers' "Scheduler"."""
    lowered = re.sub(r"^k[_ ]|scheduler$", "", name.strip().lower())
    return re.sub(r"[^a-z0-9]", "", lowered.replace("+", "p"))
