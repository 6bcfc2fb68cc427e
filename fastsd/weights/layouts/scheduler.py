"""A diffusers folder's scheduler_config.json, converted to and from `SchedulerConfig`."""

from __future__ import annotations

import difflib
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from fastsd.config import BETA_SCHEDULES, PREDICTIONS, SPACINGS, EDMConfig, SchedulerConfig, SolverConfig
from fastsd.sampling.samplers import SAMPLERS, SCHEDULES
from fastsd.weights.formats.json_file import ConfigReader

# The sampler for each scheduler class that a folder may name.
SAMPLER_OF_CLASS = {entry.diffusers: name for name, entry in SAMPLERS.items() if entry.diffusers}
EDM_CLASSES = {"EDMEulerScheduler": "euler", "EDMDPMSolverMultistepScheduler": "dpm++2m"}
# The training schedule that diffusers' classes take for keys that a file lacks.
_BETAS: dict[str, Any] = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
_SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
_BETAS_OF: dict[str, dict[str, Any]] = {
    "heun": _SD_BETAS,
    "dpm++sde": _SD_BETAS,
    "dpm2": _SD_BETAS,
    "dpm2_a": _SD_BETAS,
    "lcm": {**_SD_BETAS, "beta_schedule": "scaled_linear"},
    "tcd": {**_SD_BETAS, "beta_schedule": "scaled_linear"},
}
CLASS_OF_SAMPLER = {sampler: name for name, sampler in SAMPLER_OF_CLASS.items()}


def read_scheduler(path: Path, as_stated: bool = False) -> SchedulerConfig:
    """The noise schedule, and the sampler of the folder's scheduler class.

    diffusers' pipelines of SD 1 and 2 set a `steps_offset` of 0 to 1 (`StableDiffusionPipeline.__init__`, likewise from
    an image and with a mask); others do not. A file that lacks it leaves it open: `complete` gives 1 to its own
    sampler and 0 to others, as diffusers does.

    Args:
        path: the file.
        as_stated: the model's pipeline takes the file as it is: SDXL's, InstructPix2Pix's, the depth model's.
    """
    r = ConfigReader(path)
    name = r.data.get("_class_name")
    if isinstance(name, str) and name in EDM_CLASSES:
        return _read_edm(r, EDM_CLASSES[name])
    if not isinstance(name, str) or name not in SAMPLER_OF_CLASS:
        near = difflib.get_close_matches(str(name), (*SAMPLER_OF_CLASS, *EDM_CLASSES), n=3, cutoff=0.5)
        raise r.error("_class_name", f"fastsd has no sampler for it; near are {', '.join(near) or 'none of its own'}")
    sampler = SAMPLER_OF_CLASS[name]
    betas = _BETAS | _BETAS_OF.get(sampler, {})
    if sampler == "dpm++2m" and str(r.data.get("algorithm_type", "")).startswith("sde"):
        sampler = "dpm++2m_sde"
    r.one_of("use_flow_sigmas", (False,), False)
    r.one_of("use_dynamic_shifting", (False,), False)
    for key in ("solver_p", "shift_terminal", "tau_func", "noise_sampler_seed"):
        r.one_of(key, (None,), None)
    for key in ("predictor_order", "corrector_order"):  # SA-Solver's
        r.one_of(key, (2,), 2)
    offset = r.get("steps_offset", int, 0)
    if not as_stated:
        offset = None if r.data.get("steps_offset") is None else max(offset, 1)
    return SchedulerConfig(
        num_train_timesteps=r.get("num_train_timesteps", int, 1000),
        beta_start=r.get("beta_start", float, betas["beta_start"]),
        beta_end=r.get("beta_end", float, betas["beta_end"]),
        beta_schedule=r.one_of("beta_schedule", BETA_SCHEDULES, betas["beta_schedule"]),
        trained_betas=_trained_betas(r),
        prediction_type=r.one_of("prediction_type", PREDICTIONS, "epsilon"),
        timestep_spacing=r.one_of("timestep_spacing", (*SPACINGS, None), None),
        steps_offset=offset,
        set_alpha_to_one=None if r.data.get("set_alpha_to_one") is None else r.get("set_alpha_to_one", bool, False),
        rescale_betas_zero_snr=r.get("rescale_betas_zero_snr", bool, False),
        sampler=sampler,
        schedule=_schedule(r, sampler),
        solver=_solver(r, sampler),
        unfollowed=_unfollowed(r, sampler, as_stated),
    )


def _read_edm(r: ConfigReader, sampler: str) -> SchedulerConfig:
    """The noise levels of a model in Karras et al. 2022's terms; diffusers has two schedulers for these."""
    if str(r.data.get("algorithm_type", "")).startswith("sde"):
        sampler = "dpm++2m_sde"
    usual = EDMConfig()
    edm = EDMConfig(
        **{name: r.get(name, float, getattr(usual, name)) for name in ("sigma_data", "sigma_min", "sigma_max", "rho")},
        ramp=r.one_of("sigma_schedule", ("karras", "exponential"), usual.ramp),
    )
    if edm.sigma_min >= edm.sigma_max:
        raise r.error("sigma_min", f"it should be below sigma_max = {edm.sigma_max:g}")
    r.one_of("algorithm_type", ("dpmsolver++", "sde-dpmsolver++", None), None)
    return SchedulerConfig(
        num_train_timesteps=r.get("num_train_timesteps", int, 1000),
        prediction_type=r.one_of("prediction_type", ("epsilon", "v_prediction"), "epsilon"),
        sampler=sampler,
        solver=replace(_solver(r, sampler), sigma_min=None, sigma_max=None),
        unfollowed=_unfollowed(r, sampler, as_stated=True),
        edm=edm,
    )


def _trained_betas(r: ConfigReader) -> tuple[float, ...] | None:
    found, count = r.data.get("trained_betas"), r.get("num_train_timesteps", int, 1000)
    if found is None:
        return None
    if not isinstance(found, list) or len(found) != count or not all(type(b) is float and 0 < b < 1 for b in found):
        raise r.error("trained_betas", f"it should be a list of num_train_timesteps = {count} numbers between 0 and 1")
    return tuple(found)


def _schedule(r: ConfigReader, sampler: str) -> str:
    """The schedule of its own sampler. DPM-Solver's `use_lu_lambdas` are even in log sigma too."""
    keys = {f"use_{name}_sigmas": name for name in ("karras", "exponential", "beta")}
    if sampler.startswith("dpm++2m"):
        keys["use_lu_lambdas"] = "exponential"
    asked = [key for key in keys if r.get(key, bool, False)]
    if len(asked) > 1:
        raise r.error(asked[1], f"{asked[0]} is true too, and a run has one schedule")
    if asked and keys[asked[0]] not in SCHEDULES:
        raise r.error(asked[0], f"fastsd has no such schedule; it has {', '.join(SCHEDULES)}")
    return keys[asked[0]] if asked else "default"


# The values that `SolverConfig`'s fields may have; numbers have their range in `ConfigReader`.
_CHOICES: dict[str, tuple[Any, ...]] = {
    "solver_order": (1, 2, 3),
    "solver_type": ("midpoint", "heun", "bh1", "bh2", "logrho"),
    "algorithm_type": ("dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver", "deis", "data_prediction"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "interpolation_type": ("linear", "log_linear"),
    "timestep_type": ("discrete", "continuous"),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large"),
}
_TYPES = {
    int: ("original_inference_steps",),
    float: ("lambda_min_clipped", "sigma_min", "sigma_max", "timestep_scaling"),
}
_FLAGS = ("predict_x0", "lower_order_final", "euler_at_final", "use_lu_lambdas")


# Values that are every sampler's own where a file states nothing, so that stating them says nothing.
_USUAL: dict[str, Any] = {
    "solver_order": 2,
    "algorithm_type": "dpmsolver++",
    "predict_x0": True,
    "euler_at_final": False,
    "disable_corrector": (),
    "final_sigmas_type": "zero",
    "lambda_min_clipped": -math.inf,
    "use_lu_lambdas": False,
    "interpolation_type": "linear",
    "timestep_type": "discrete",
    "variance_type": "fixed_small",
    "original_inference_steps": 50,
    "timestep_scaling": 10.0,
}


def _solver(r: ConfigReader, sampler: str) -> SolverConfig:
    """What the file states of its sampler beyond the usual."""
    found: dict[str, Any] = {key: r.one_of(key, (*values, None), None) for key, values in _CHOICES.items()}
    numbers = {key: kind for kind, keys in {**_TYPES, bool: _FLAGS}.items() for key in keys}
    for key, kind in numbers.items():
        found[key] = None if r.data.get(key) is None else r.get(key, kind, None)
    steps = r.data.get("disable_corrector")
    if steps is not None and not (isinstance(steps, list) and all(type(step) is int for step in steps)):
        raise r.error("disable_corrector", "it should be a list of steps")
    found["disable_corrector"] = None if steps is None else tuple(steps)
    if (found["original_inference_steps"] or 1) > r.get("num_train_timesteps", int, 1000):
        raise r.error("original_inference_steps", "it should be at most num_train_timesteps")
    usual = _USUAL | ({"algorithm_type": "sde-dpmsolver++"} if sampler == "dpm++2m_sde" else {})
    if found["algorithm_type"] in ("deis", "data_prediction"):  # the only ones of their classes
        found["algorithm_type"] = None
    if found["solver_type"] in ("midpoint", "bh2", "logrho"):  # each class takes its own for another's
        found["solver_type"] = None
    return SolverConfig(
        **{key: None if key in usual and value == usual[key] else value for key, value in found.items()}
    )


def _unfollowed(r: ConfigReader, sampler: str, as_stated: bool) -> tuple[str, ...]:
    """Keys that no table follows, where they ask for something.

    diffusers' pipelines of SD 1 and 2 set `clip_sample` to false; others do not, and DDIM's and DDPM's default
    is true. `skip_prk_steps` false is PNDM's default.
    """
    found = ["thresholding"] if r.get("thresholding", bool, False) else []
    clips = r.get("clip_sample", bool, sampler in ("ddim", "ddpm"))
    found += ["clip_sample"] if clips and as_stated else []
    whole = not r.get("skip_prk_steps", bool, sampler != "pndm")
    return (*found, "skip_prk_steps") if whole else tuple(found)


def write_scheduler(config: SchedulerConfig) -> dict[str, Any]:
    """The JSON that `read_scheduler`, and diffusers, read back."""
    stated = {f.name: getattr(config, f.name) for f in fields(config)} | vars(config.solver)
    for name in ("sampler", "schedule", "solver", "unfollowed", "edm"):
        del stated[name]
    stated |= {key: key != "skip_prk_steps" for key in config.unfollowed}
    result = {key: list(value) if isinstance(value, tuple) else value for key, value in stated.items()}
    result = {key: value for key, value in result.items() if value is not None}
    if config.edm is not None:
        return _edm_json(config, result)
    result["_class_name"] = CLASS_OF_SAMPLER.get(config.sampler.removesuffix("_sde"), "DDIMScheduler")
    if config.sampler == "dpm++2m_sde":
        result.setdefault("algorithm_type", "sde-dpmsolver++")
    if config.sampler in ("ddim", "ddpm", "lcm"):
        result.setdefault("clip_sample", False)  # clipping belongs to pixels, not to latents
    if config.sampler == "pndm":
        result.setdefault("skip_prk_steps", True)
    if config.schedule in ("karras", "exponential", "beta") and not config.solver.use_lu_lambdas:
        result[f"use_{config.schedule}_sigmas"] = True
    return result


def _edm_json(config: SchedulerConfig, stated: dict[str, Any]) -> dict[str, Any]:
    """The JSON of an EDM model's scheduler."""
    assert config.edm is not None
    levels = {"sigma_schedule" if key == "ramp" else key: value for key, value in vars(config.edm).items()}
    kept = {key: stated[key] for key in ("num_train_timesteps", "prediction_type")}
    if config.sampler == "euler":
        return {**kept, **levels, "_class_name": "EDMEulerScheduler"}
    solver = {key: value for key, value in stated.items() if key in vars(config.solver)}
    if config.sampler == "dpm++2m_sde":
        solver["algorithm_type"] = "sde-dpmsolver++"
    return {**kept, **solver, **levels, "_class_name": "EDMDPMSolverMultistepScheduler"}
