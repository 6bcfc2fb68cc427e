"""Every sampler and every schedule, by name. It imports no module with numbers in it, so that --help stays light.

To add a sampler, write its function (a `Schedule` to a `Table`) and add a row.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from fastsd.errors import FastsdError


@dataclass(frozen=True)
class Sampler:
    """One sampler.

    Attributes:
        name: ours.
        function: where it is, "module:function" of this subpackage.
        label: A1111's name, which images carry; ours where A1111 has no such sampler.
        aliases: other names that users know, as `_key` spells them.
        schedules: it takes a schedule. Samplers of the discrete process have timesteps of their own, and no sigmas that
            a schedule could move.
    """

    name: str
    function: str
    label: str
    aliases: tuple[str, ...] = ()
    schedules: bool = True


# Case, spaces, "_", "-", a leading "k_" and "pp" for "++" do not matter in a name, so "DPM++ 2M", "dpmpp_2m" and
# "k_dpmpp_2m" need no alias.
SAMPLERS: dict[str, Sampler] = {
    row.name: row
    for row in (
        Sampler("ddpm", "vp:ddpm", "DDPM", schedules=False),
        Sampler("ddim", "vp:ddim", "DDIM", schedules=False),
        Sampler("pndm", "vp:pndm", "PLMS", ("plms",), schedules=False),
        Sampler("euler", "karras:euler", "Euler", ("eulerdiscrete",)),
        Sampler("euler_a", "karras:euler_a", "Euler a", ("eulerancestral", "eulerancestraldiscrete")),
        Sampler("heun", "karras:heun", "Heun", ("heundiscrete",)),
        Sampler("dpm++2m", "dpm_solver:dpmpp_2m", "DPM++ 2M", ("dpmpp", "dpmsolverpp", "dpmsolvermultistep")),
        Sampler("dpm++2m_sde", "dpm_solver:dpmpp_2m_sde", "DPM++ 2M SDE", ("dpmppsde2m",)),
        Sampler("dpm++sde", "karras:dpmpp_sde", "DPM++ SDE", ("dpmsolversde",)),
        Sampler("dpm++2s", "dpm_solver:dpmpp_2s", "DPM++ 2S", ("dpmsolversinglestep",)),
        Sampler("unipc", "unipc:unipc", "UniPC", ("unipcmultistep", "unipcbh2")),
        Sampler("lms", "karras:lms", "LMS", ("lmsdiscrete",)),
        Sampler("lcm", "vp:lcm", "LCM", schedules=False),
        Sampler("euler_maruyama", "vp:euler_maruyama", "Euler Maruyama", ("eulermaruyamasde", "em"), schedules=False),
    )
}
# By our names, A1111's. "Uniform" is written out: A1111 reads a missing schedule as the sampler's favourite, which is
# Karras for DPM++ 2M.
SCHEDULES = {"default": "Uniform", "karras": "Karras", "exponential": "Exponential", "sgm_uniform": "SGM Uniform"}


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
    known = {_key(name): name for name in SAMPLERS}
    known |= {alias: row.name for row in SAMPLERS.values() for alias in row.aliases}
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
