"""The registry of samplers and schedules. It imports neither numpy nor torch, so that `--help` starts fast.

To add a sampler, add an entry to `SAMPLERS`. `resolve`, the tables (`fastsd.sampling.build`), the command line's help,
A1111's text and the schedulers of diffusers' folders derive from it.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from fastsd.config import SchedulerConfig
from fastsd.errors import FastsdError
from fastsd.sampling.names import key_of, refusal

if TYPE_CHECKING:
    from fastsd.sampling.schedule import Schedule
    from fastsd.sampling.table import Table


@dataclass(frozen=True)
class Sampler:
    """One sampler.

    Attributes:
        name: in the API, on the command line and in metadata.
        function: `Schedule -> Table`, as "module.function" in this package; imported at its first use.
        label: its name in A1111's text.
        diffusers: the scheduler class that stands for it in a diffusers folder; "": none does.
        aliases: other spellings. Case, spaces, "_", "-", a leading "k_" and "pp" for "++" never matter.
        takes_schedule: its noise levels can be moved. Samplers of the discrete process cannot: they step from one
            training timestep to another.
        takes_levels: it runs at timesteps that the caller lists. DDIM and PNDM step by a fixed stride, Restart and DPM
            fast space their steps themselves.
        takes_eta: it uses eta.
        unstated: what it takes for the keys that a checkpoint's config leaves open, where that differs from
            `UNSTATED`; diffusers' class has the same defaults.
    """

    name: str
    function: str
    label: str
    diffusers: str = ""
    aliases: tuple[str, ...] = ()
    takes_schedule: bool = True
    takes_levels: bool = True
    takes_eta: bool = False
    unstated: Mapping[str, Any] = field(default_factory=dict)

    @property
    def make_table(self) -> Callable[[Schedule], Table]:
        """The function."""
        module, function = self.function.split(".")
        return getattr(importlib.import_module(f"fastsd.sampling.{module}"), function)


@dataclass(frozen=True)
class Unfollowed:
    """A setting that runs without effect: what it asks for, and the samplers to which diffusers applies it."""

    meaning: str
    samplers: tuple[str, ...]


# What samplers take for the keys that a config leaves open. k-diffusion's samplers, so A1111's too, space as linspace.
UNSTATED: dict[str, Any] = {"timestep_spacing": "linspace", "steps_offset": 0, "set_alpha_to_one": False}
# Keys of a scheduler file that no table can follow: they depend on the data, or on more saved outputs than a row has.
UNFOLLOWED: dict[str, Unfollowed] = {
    "clip_sample": Unfollowed("clipping of the predicted image", ("ddpm", "ddim", "heun", "lcm", "tcd")),
    "thresholding": Unfollowed(
        "dynamic thresholding",
        ("ddpm", "ddim", "dpm++2m", "dpm++2m_sde", "dpm++2s", "unipc", "deis", "sa_solver", "lcm", "tcd"),
    ),
    "skip_prk_steps": Unfollowed("a Runge-Kutta start", ("pndm",)),
}
_LEADING = {"timestep_spacing": "leading"}
_TO_ONE = {**_LEADING, "set_alpha_to_one": True}

# A1111 has no "DDPM", no "DPM++ 2S" and no "Euler Maruyama"; these labels are ours.
SAMPLERS: dict[str, Sampler] = {
    sampler.name: sampler
    for sampler in (
        Sampler(
            "ddpm", "vp.ddpm", "DDPM", "DDPMScheduler", ("ddpm_parallel",), takes_schedule=False, unstated=_LEADING
        ),
        Sampler(
            "ddim",
            "vp.ddim",
            "DDIM",
            "DDIMScheduler",
            ("ddim_parallel",),
            takes_schedule=False,
            takes_levels=False,
            takes_eta=True,
            unstated=_TO_ONE,
        ),
        Sampler(
            "pndm",
            "vp.pndm",
            "PLMS",
            "PNDMScheduler",
            takes_schedule=False,
            takes_levels=False,
            unstated=_LEADING,
        ),
        Sampler("euler", "karras.euler", "Euler", "EulerDiscreteScheduler"),
        Sampler("euler_a", "karras.euler_a", "Euler a", "EulerAncestralDiscreteScheduler", ("euler_ancestral",)),
        Sampler("heun", "karras.heun", "Heun", "HeunDiscreteScheduler"),
        Sampler("dpm++2m", "dpm_solver.dpmpp_2m", "DPM++ 2M", "DPMSolverMultistepScheduler", ("dpm++", "dpm_solver++")),
        Sampler("dpm++2m_sde", "dpm_solver.dpmpp_2m_sde", "DPM++ 2M SDE", aliases=("dpm++_sde_2m",)),
        Sampler("dpm++sde", "karras.dpmpp_sde", "DPM++ SDE", "DPMSolverSDEScheduler"),
        Sampler("dpm++2s", "dpm_solver.dpmpp_2s", "DPM++ 2S", "DPMSolverSinglestepScheduler"),
        Sampler("dpm++2s_a", "two_stage.dpmpp_2s_a", "DPM++ 2S a", aliases=("dpmpp_2s_ancestral",)),
        Sampler("dpm2", "two_stage.dpm2", "DPM2", "KDPM2DiscreteScheduler"),
        Sampler("dpm2_a", "two_stage.dpm2_a", "DPM2 a", "KDPM2AncestralDiscreteScheduler", ("dpm_2_ancestral",)),
        Sampler("heun++", "two_stage.heunpp", "HeunPP2"),
        Sampler("restart", "two_stage.restart", "Restart", takes_levels=False),
        Sampler("dpm++2m_sde_heun", "dpm_solver_sde.dpmpp_2m_sde_heun", "DPM++ 2M SDE Heun"),
        Sampler("dpm++3m_sde", "dpm_solver_sde.dpmpp_3m_sde", "DPM++ 3M SDE"),
        Sampler("dpm_fast", "exponential.dpm_fast", "DPM fast", takes_levels=False),
        Sampler("unipc", "unipc.unipc", "UniPC", "UniPCMultistepScheduler", ("unipc_bh2",)),
        Sampler("lms", "karras.lms", "LMS", "LMSDiscreteScheduler"),
        Sampler("ipndm", "adams.ipndm", "IPNDM"),
        Sampler("ipndm_v", "adams.ipndm_v", "IPNDM_V"),
        Sampler("gradient_estimation", "adams.gradient_estimation", "Gradient Estimation"),
        Sampler("deis", "exp_adams.deis", "DEIS", "DEISMultistepScheduler"),
        Sampler("sa_solver", "exp_adams.sa_solver", "SA Solver", "SASolverScheduler"),
        Sampler("res_multistep", "exponential.res_multistep", "Res Multistep"),
        Sampler(
            "res_multistep_a",
            "exponential.res_multistep_a",
            "Res Multistep Ancestral",
            aliases=("res_multistep_ancestral",),
        ),
        Sampler("seeds_2", "exponential.seeds_2", "SEEDS 2"),
        Sampler("seeds_3", "exponential.seeds_3", "SEEDS 3"),
        Sampler("exp_heun", "exponential.exp_heun", "Exp Heun", aliases=("exp_heun_2_x0",)),
        Sampler("exp_heun_sde", "exponential.exp_heun_sde", "Exp Heun SDE", aliases=("exp_heun_2_x0_sde",)),
        Sampler("er_sde", "exponential.er_sde", "ER SDE"),
        Sampler("tcd", "tcd.tcd", "TCD", "TCDScheduler", takes_schedule=False, takes_eta=True, unstated=_TO_ONE),
        Sampler(
            "lcm",
            "vp.lcm",
            "LCM",
            "LCMScheduler",
            takes_schedule=False,
            unstated=_TO_ONE,
        ),
        Sampler(
            "euler_maruyama",
            "vp.euler_maruyama",
            "Euler Maruyama",
            aliases=("euler_maruyama_sde", "em"),
            takes_schedule=False,
            unstated=_LEADING,
        ),
    )
}

# Schedules and their names in A1111's text. "Uniform" is always written: where the schedule is missing, A1111 takes the
# sampler's favourite, which is Karras for DPM++ 2M.
SCHEDULES = {
    "default": "Uniform",
    "karras": "Karras",
    "exponential": "Exponential",
    "sgm_uniform": "SGM Uniform",
    "normal": "Normal",
    "simple": "Simple",
    "ddim_uniform": "DDIM",
    "beta": "Beta",
    "beta_comfy": "Beta ComfyUI",
    "kl_optimal": "KL Optimal",
    "kl_optimal_comfy": "KL Optimal ComfyUI",
    "linear_quadratic": "Linear Quadratic",
    "turbo": "Turbo",
    "sd_turbo": "SD Turbo",
    "align_your_steps": "Align Your Steps",
    "align_your_steps_32": "Align Your Steps 32",
    "align_your_steps_gits": "Align Your Steps GITS",
}
# Samplers and schedules that only the long help lists.
RARE = frozenset(
    ("heun++", "dpm_fast", "ipndm", "ipndm_v", "gradient_estimation", "res_multistep_a", "seeds_2", "seeds_3")
    + ("exp_heun", "exp_heun_sde", "er_sde", "dpm++2m_sde_heun", "beta_comfy", "kl_optimal_comfy", "linear_quadratic")
    + ("sd_turbo", "align_your_steps_32", "align_your_steps_gits")
)
# Other spellings. A1111's Automatic, the sampler's favourite, belongs to its rules (--like a1111). "ka" ends its short
# names, such as k_dpmpp_2m_ka. Polyexponential is Exponential at its rho, 1.
SCHEDULE_ALIASES = {
    "align_your_steps_11": "align_your_steps",
    "automatic": "default",
    "ays": "align_your_steps",
    "ays_32": "align_your_steps_32",
    "gits": "align_your_steps_gits",
    "ka": "karras",
    "polyexponential": "exponential",
}


def complete(config: SchedulerConfig, sampler: str, spacing: str | None = None) -> SchedulerConfig:
    """The config as `sampler` runs it, with nothing left open.

    What the config states counts, as in diffusers' `from_config`; for the rest the sampler has its own values. The
    `steps_offset` of the checkpoint's own sampler is 1, as diffusers' pipelines of SD 1 and 2 set it.

    Args:
        config: the checkpoint's.
        sampler: a name in `SAMPLERS`.
        spacing: the caller's, which comes first.
    """
    own = UNSTATED | dict(SAMPLERS[sampler].unstated) | ({"steps_offset": 1} if sampler == config.sampler else {})
    values = {key: value for key, value in own.items() if getattr(config, key) is None}
    return replace(config, **values | ({"timestep_spacing": spacing} if spacing is not None else {}))


def resolve(sampler: str, schedule: str = "default") -> tuple[str, str]:
    """The names in `SAMPLERS` and `SCHEDULES` that a user means.

    The spellings of A1111, ComfyUI and k-diffusion and diffusers' class names are known. A schedule at the end of the
    sampler's name ("DPM++ 2M Karras") applies where `schedule` is "default". "_gpu", which says where ComfyUI draws
    noise, is left out.

    Raises:
        FastsdError: an unknown name, with the nearest ones; or a sampler of another program that no table can follow.
    """
    schedules = {_own_key(spelling): name for name, label in SCHEDULES.items() for spelling in (name, label)}
    schedules |= {_own_key(spelling): name for spelling, name in SCHEDULE_ALIASES.items()}
    resolved = schedules.get(key_of(schedule))
    if resolved is None:
        raise FastsdError(f"{schedule!r} is unknown; fastsd knows {', '.join(SCHEDULES)}", argument="schedule")
    known = spellings()
    key = key_of(sampler)
    key = key if key in known else key.removesuffix("gpu")
    for suffix, name in schedules.items():
        if key not in known and key.endswith(suffix) and key.removesuffix(suffix) in known:
            key, resolved = key.removesuffix(suffix), name if resolved == "default" else resolved
    if key not in known:
        refused = refusal(sampler, known)
        if refused is not None:
            raise FastsdError(f"{sampler!r}: {refused[0]}; the nearest is {refused[1]}", argument="sampler")
        near = dict.fromkeys(known[match] for match in difflib.get_close_matches(key, known, n=4, cutoff=0.5))
        offer = f"did you mean {' or '.join(near)}?" if near else "docs/samplers.md lists those that fastsd knows"
        raise FastsdError(f"{sampler!r} is unknown; {offer}", argument="sampler")
    return known[key], resolved


def spellings() -> dict[str, str]:
    """The names in `SAMPLERS` by the keys of all their spellings."""
    return {
        _own_key(spelling): entry.name
        for entry in SAMPLERS.values()
        for spelling in (entry.name, entry.label, entry.diffusers, *entry.aliases)
        if spelling
    }


_own_key = cache(key_of)  # of the spellings that stand in this file; users' may be many, and long
