"""A diffusers folder's scheduler_config.json, converted to and from `SchedulerConfig`."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from fastsd.config import PREDICTIONS, SPACINGS, SchedulerConfig
from fastsd.sampling.samplers import SAMPLERS
from fastsd.weights.formats.json_file import ConfigReader

# The sampler for each scheduler class that a folder may name.
SAMPLER_OF_CLASS = {entry.diffusers: name for name, entry in SAMPLERS.items() if entry.diffusers}
# The training schedule that diffusers' classes take for keys that a file lacks.
_BETAS: dict[str, Any] = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
_SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
_BETAS_OF: dict[str, dict[str, Any]] = {
    "heun": _SD_BETAS,
    "dpm++sde": _SD_BETAS,
    "lcm": {**_SD_BETAS, "beta_schedule": "scaled_linear"},
}
CLASS_OF_SAMPLER = {sampler: name for name, sampler in SAMPLER_OF_CLASS.items()}


def read_scheduler(path: Path, xl: bool = False) -> SchedulerConfig:
    """The noise schedule, and the sampler of the folder's scheduler class.

    diffusers' pipelines of SD 1 and 2 set a `steps_offset` of 0 to 1 (`StableDiffusionPipeline.__init__`, likewise from
    an image and with a mask); those of SDXL do not. A file that lacks it leaves it open: `complete` gives 1 to its own
    sampler and 0 to others, as diffusers does.

    Args:
        path: the file.
        xl: it is SDXL's.
    """
    r = ConfigReader(path)
    name = r.data.get("_class_name")
    if not isinstance(name, str) or name not in SAMPLER_OF_CLASS:
        raise r.error("_class_name", f"fastsd supports {', '.join(SAMPLER_OF_CLASS)}")
    sampler = SAMPLER_OF_CLASS[name]
    betas = _BETAS | _BETAS_OF.get(sampler, {})
    if sampler == "dpm++2m" and str(r.data.get("algorithm_type", "")).startswith("sde"):
        sampler = "dpm++2m_sde"
    karras, exponential = (r.get(key, bool, False) for key in ("use_karras_sigmas", "use_exponential_sigmas"))
    r.one_of("use_flow_sigmas", (False,), False)
    if r.data.get("trained_betas") is not None:
        raise r.error("trained_betas", "fastsd supports only schedules given by beta_start and beta_end")
    offset = r.get("steps_offset", int, 0)
    if not xl:
        offset = None if r.data.get("steps_offset") is None else max(offset, 1)
    return SchedulerConfig(
        num_train_timesteps=r.get("num_train_timesteps", int, 1000),
        beta_start=r.get("beta_start", float, betas["beta_start"]),
        beta_end=r.get("beta_end", float, betas["beta_end"]),
        beta_schedule=r.one_of(
            "beta_schedule", ("linear", "scaled_linear", "squaredcos_cap_v2"), betas["beta_schedule"]
        ),
        prediction_type=r.one_of("prediction_type", PREDICTIONS, "epsilon"),
        timestep_spacing=r.one_of("timestep_spacing", (*SPACINGS, None), None),
        steps_offset=offset,
        set_alpha_to_one=None if r.data.get("set_alpha_to_one") is None else r.get("set_alpha_to_one", bool, False),
        rescale_betas_zero_snr=r.get("rescale_betas_zero_snr", bool, False),
        sampler=sampler,
        schedule="karras" if karras else "exponential" if exponential else "default",
    )


def write_scheduler(config: SchedulerConfig) -> dict[str, Any]:
    """The JSON that `read_scheduler`, and diffusers, read back."""
    stated = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in ("sampler", "schedule")}
    result = {key: value for key, value in stated.items() if value is not None}
    result["_class_name"] = CLASS_OF_SAMPLER.get(config.sampler.removesuffix("_sde"), "DDIMScheduler")
    if config.sampler == "dpm++2m_sde":
        result["algorithm_type"] = "sde-dpmsolver++"
    if config.sampler in ("ddim", "ddpm", "lcm"):
        result["clip_sample"] = False  # clipping belongs to pixels, not to latents
    if config.sampler == "pndm":
        result["skip_prk_steps"] = True
    if config.schedule in ("karras", "exponential"):
        result[f"use_{config.schedule}_sigmas"] = True
    return result
