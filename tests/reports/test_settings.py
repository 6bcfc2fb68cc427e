"""What people reported of scheduler files: settings that ran otherwise than in diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fastsd.config import SchedulerConfig
from fastsd.errors import FastsdError
from fastsd.generate.defaults import Defaults
from fastsd.generate.request import plan
from fastsd.parameters import recorded
from fastsd.pipeline import Pipeline
from fastsd.sampling.build import build
from fastsd.sampling.samplers import SAMPLERS, SCHEDULES
from fastsd.weights import save_folder
from fastsd.weights.inspect import inspect
from fastsd.weights.layouts.scheduler import read_scheduler
from tests.support import original
from tests.support.lifted import Case, difference, reference, run_table, scheduler_class

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers", "ignore::FutureWarning")

_SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
_SD15 = _SD | {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "clip_sample": False, "trained_betas": None}
# What published scheduler_config.json files state, by what they belong to.
PUBLISHED: dict[str, dict[str, Any]] = {
    "SD 1.5": _SD15 | {"set_alpha_to_one": False, "steps_offset": 1},
    "SD 2.1": _SD15
    | {"_class_name": "DDIMScheduler", "set_alpha_to_one": False, "steps_offset": 1, "prediction_type": "v_prediction"},
    "DDIM, to one": _SD15 | {"_class_name": "DDIMScheduler", "set_alpha_to_one": True, "steps_offset": 1},
    "SD, early": _SD15,
    "SD, offset 0": _SD15 | {"_class_name": "DDIMScheduler", "steps_offset": 0},
    "DDPM": _SD15 | {"_class_name": "DDPMScheduler", "steps_offset": 1, "variance_type": "fixed_small"},
    "Euler a": _SD15 | {"_class_name": "EulerAncestralDiscreteScheduler", "steps_offset": 1, "set_alpha_to_one": False},
    "UniPC": _SD15 | {"_class_name": "UniPCMultistepScheduler", "steps_offset": 1, "timestep_spacing": "linspace"},
    "SDXL": _SD15
    | {"_class_name": "EulerDiscreteScheduler", "steps_offset": 1, "timestep_spacing": "leading"}
    | {"set_alpha_to_one": False, "interpolation_type": "linear", "use_karras_sigmas": False},
    "SDXL, early": _SD15 | {"_class_name": "DDIMScheduler"},
    "SDXL Turbo": _SD15
    | {"_class_name": "EulerAncestralDiscreteScheduler", "steps_offset": 1, "timestep_spacing": "trailing"},
}
STEPS = 7
SHORT = {"num_inference_steps": STEPS, "width": 32, "height": 32}


def read(tmp_path: Path, stated: dict[str, Any], xl: bool = False) -> Any:
    file = tmp_path / "scheduler_config.json"
    file.write_text(json.dumps(stated))
    return read_scheduler(file, as_stated=xl)


def pipelines_config(stated: dict[str, Any], xl: bool) -> Any:
    """`pipe.scheduler.config` of the folder; the constructor of Stable Diffusion's pipeline changes what is out of
    date, that of SDXL's does not."""
    scheduler = scheduler_class(stated["_class_name"]).from_config(stated)
    if not xl:
        parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "unet", "safety_checker", "feature_extractor"))
        diffusers.StableDiffusionPipeline(**parts, scheduler=scheduler, requires_safety_checker=False)
    return scheduler.config


def diffusers_case(sampler: str, stated: dict[str, Any], xl: bool, **changes: Any) -> Case:
    """`SomeScheduler.from_config(pipe.scheduler.config)`, run as its pipeline runs it."""
    name = SAMPLERS[sampler].diffusers or "DPMSolverMultistepScheduler"
    config, extra = pipelines_config(stated, xl), {}
    if name != stated["_class_name"]:
        extra = {"algorithm_type": "sde-dpmsolver++"} if sampler == "dpm++2m_sde" else {}
        config = scheduler_class(name).from_config(config, **extra).config
    keys = scheduler_class(name)._get_init_keys(scheduler_class(name))
    used = {key: config[key] for key in keys if key in config and config[key] != []}  # a list cannot be a cache's key
    if sampler == "tcd":
        changes["step"] = (("eta", 0.0),)  # what its pipelines pass
    return Case(scheduler=name, steps=STEPS, config=tuple(used.items()), **changes)


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if SAMPLERS[name].diffusers or name == "dpm++2m_sde"])
@pytest.mark.parametrize("model", PUBLISHED)
def test_a_sampler_chosen_for_a_published_model_runs_as_in_diffusers(model: str, sampler: str, tmp_path: Path) -> None:
    """Every sampler on every config: the timesteps, and a whole run on a nonlinear network.

    Source: diffusers' `from_config`, which leaves to each class the keys that the file does not state.
    """
    stated, xl = PUBLISHED[model], model.startswith("SDXL")
    if sampler in ("ddim", "ddpm") and model == "SDXL, early":
        stated = stated | {"clip_sample": False}
    theirs = reference(diffusers_case(sampler, stated, xl))
    ours = run_table(build(sampler, STEPS, read(tmp_path, stated, xl)), False)
    assert ours.timesteps == pytest.approx(theirs.timesteps, abs=1e-9)
    assert difference(ours, theirs) < 1e-9  # rounding, see tests/sampling/test_diffusers.py


def test_euler_starts_at_the_first_noise_level_like_diffusers() -> None:
    """SD 1.5's config states no spacing, so Euler has its own, linspace: 999, 832.5, ... in diffusers and A1111.

    It used to begin at 853, in the spacing of the model's own sampler.
    """
    components = original.components("sd1")
    for sampler in ("euler", "euler_a", "heun", "lms", "dpm++sde"):
        request = plan(components, Defaults(components).settings(None), {"prompt": "x", "sampler": sampler, **SHORT})
        times = request.passes[0].table.timesteps.tolist()
        assert times[0] == 999 and [t for t in (832.5, 666.0, 499.5, 333.0, 166.5) if t not in times] == []
        assert request.settings.spacing == "linspace"
    request = plan(components, Defaults(components).settings(None), {"prompt": "x", "sampler": "ddim", **SHORT})
    assert request.passes[0].table.timesteps.tolist() == [853, 711, 569, 427, 285, 143, 1]


def test_the_spacing_can_be_chosen_and_is_kept_with_the_image() -> None:
    components = original.components("sd1")
    defaults = Defaults(components).settings(None)
    request = plan(components, defaults, {"prompt": "x", "sampler": "euler", "spacing": "leading", **SHORT})
    assert request.passes[0].table.timesteps[0] == 853
    assert recorded(request.settings)["spacing"] == "leading"
    request = plan(components, defaults, {"prompt": "x", "sampler": "dpm++2m", "spacing": "trailing", **SHORT})
    assert request.passes[0].table.timesteps.tolist() == [999, 856, 713, 570, 428, 285, 142]


@pytest.mark.parametrize(
    ("sampler", "schedule"),
    [("lcm", "default"), ("dpm++2m", "karras"), ("euler", "sgm_uniform"), ("dpm++2s", "karras")],
)
def test_a_spacing_that_would_change_nothing_is_refused(sampler: str, schedule: str) -> None:
    components = original.components("sd1")
    arguments = {"prompt": "x", "sampler": sampler, "schedule": schedule, **SHORT}
    assert plan(components, Defaults(components).settings(None), arguments).settings.spacing is None
    with pytest.raises(FastsdError, match=f"spacing: {sampler.replace('+', '[+]')} on the {schedule} schedule has"):
        plan(components, Defaults(components).settings(None), arguments | {"spacing": "trailing"})


@pytest.mark.parametrize("stated", [{}, {"steps_offset": 0}, {"steps_offset": 1}])
def test_an_early_sd_folder_runs_with_an_offset_of_one(stated: dict[str, Any], tmp_path: Path) -> None:
    """Source: the constructors of diffusers' Stable Diffusion pipelines set `steps_offset` to 1; SDXL's do not."""
    for name, sampler in (("DDIMScheduler", "ddim"), ("PNDMScheduler", "pndm")):
        config = {**_SD, "_class_name": name, **stated}
        assert build(sampler, STEPS, read(tmp_path, config)).timesteps[-1] == 1
        assert build(sampler, STEPS, read(tmp_path, config, xl=True)).timesteps[-1] == stated.get("steps_offset", 0)


@pytest.mark.parametrize(
    ("sampler", "stated", "note"),
    [
        ("ddim", {"_class_name": "DDIMScheduler"}, "clipping of the predicted image (clip_sample)"),
        (
            "ddim",
            {"_class_name": "DDIMScheduler", "clip_sample": True},
            "clipping of the predicted image (clip_sample)",
        ),
        ("dpm++2m", {"_class_name": "DPMSolverMultistepScheduler", "thresholding": True}, "dynamic thresholding"),
        ("pndm", {"_class_name": "PNDMScheduler"}, "a Runge-Kutta start (skip_prk_steps)"),
    ],
)
def test_what_no_sampler_follows_is_said(sampler: str, stated: dict[str, Any], note: str, tmp_path: Path) -> None:
    """Source: the defaults of diffusers' classes; SDXL's pipelines do not change them."""
    components = original.components("sdxl")
    components.scheduler = read(tmp_path, _SD | stated, xl=True)
    defaults = Defaults(components).settings(None)
    notes = plan(components, defaults, {"prompt": "x", "sampler": sampler, **SHORT}).notes
    assert any(line.startswith("the model's scheduler file asks for") and note in line for line in notes)
    others = plan(components, defaults, {"prompt": "x", "sampler": "euler", **SHORT}).notes
    assert not any("scheduler file" in line for line in others)


def test_sd_folders_do_not_clip_whatever_their_file_says(tmp_path: Path) -> None:
    """Source: the constructors of diffusers' Stable Diffusion pipelines set `clip_sample` to false."""
    for clip in ({}, {"clip_sample": True}):
        assert read(tmp_path, {**_SD, "_class_name": "DDIMScheduler", **clip}).unfollowed == ()


MARKERS = {
    "Playground 2.5": {"edm_mean": torch.tensor([-1.6, 1.9, -1.4, 2.5]), "edm_std": torch.tensor([8.5, 5.9, 6.5, 5.2])},
    "CosXL": {"edm_vpred.sigma_max": torch.tensor(120.0), "edm_vpred.sigma_min": torch.tensor(0.002)},
}


def file_with(tmp_path: Path, markers: dict[str, torch.Tensor]) -> Path:
    """A tiny SDXL file that holds marker tensors."""
    save_folder(original.components("sdxl"), tmp_path / "folder", torch.float32)
    stored = {key: value.contiguous() for key, value in original.file_tensors(tmp_path / "folder", "sdxl").items()}
    save_file(stored | markers, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("model", MARKERS)
def test_a_file_with_markers_of_an_edm_model_runs_in_its_own_terms(model: str, tmp_path: Path) -> None:
    """Source of the keys and their meaning: ComfyUI's comfy/supported_models.py, `SDXL.model_type`, and its defaults of
    sigma_data in comfy/model_sampling.py. Such files were drawn as SDXL that predicts epsilon."""
    components = Pipeline.from_pretrained(file_with(tmp_path, MARKERS[model]), "cpu", "fp32").components
    edm, config = components.scheduler.edm, components.vae.config
    assert edm is not None
    if model == "CosXL":
        assert (edm.sigma_data, edm.sigma_min, edm.sigma_max) == (1.0, pytest.approx(0.002), 120.0)
        assert components.scheduler.prediction_type == "v_prediction" and config.latents_mean is None
    else:
        assert (edm.sigma_data, edm.sigma_min, edm.sigma_max) == (0.5, 0.002, 80.0)
        assert components.scheduler.prediction_type == "epsilon" and config.scaling_factor == 0.5
        assert config.latents_std == pytest.approx((8.5, 5.9, 6.5, 5.2))
    for sampler in ("euler", "dpm++2m", "heun"):
        times = build(sampler, 5, components.scheduler).timesteps
        assert times[0] == pytest.approx(np.log(edm.sigma_max) / 4)


@pytest.mark.parametrize(("model", "prediction"), [("Playground 2.5", "epsilon"), ("CosXL", "v_prediction")])
def test_inspect_reads_the_markers_as_loading_does(model: str, prediction: str, tmp_path: Path) -> None:
    """`inspect` called CosXL an SDXL that predicts epsilon, and the markers extra keys."""
    facts = dict(inspect(file_with(tmp_path, MARKERS[model])))
    assert facts["prediction"].startswith(f"{prediction} (the file holds the marker key")
    assert facts["extra keys"] == "none"


def test_half_of_the_markers_is_refused_by_name(tmp_path: Path) -> None:
    path = file_with(tmp_path, {"edm_mean": torch.zeros(4)})
    with pytest.raises(FastsdError, match="the key edm_std is missing"):
        Pipeline.from_pretrained(path, "cpu", "fp32")


def test_an_empty_marker_of_v_prediction_and_zero_snr_is_honoured(tmp_path: Path) -> None:
    """ComfyUI marks v-prediction files with the empty tensors `v_pred` and `ztsnr`."""
    markers = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    scheduler = Pipeline.from_pretrained(file_with(tmp_path, markers), "cpu", "fp32").components.scheduler
    assert scheduler.prediction_type == "v_prediction" and scheduler.rescale_betas_zero_snr
    assert build("euler", 5, scheduler).timesteps[0] == 999


def test_euler_maruyama_runs_at_every_training_timestep() -> None:
    """1000 steps in leading spacing with offset 1 visit the last timestep twice; log 1 may round below 0."""
    for spacing in ("leading", "trailing", "linspace"):
        table = build("euler_maruyama", 1000, SchedulerConfig(), spacing=spacing)
        assert np.isfinite(table.rows).all() and (table.rows[:, 10] >= 0).all()


@pytest.mark.heavy
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_any_number_of_steps_runs_or_is_refused_in_one_line(sampler: str) -> None:
    schedules = SCHEDULES if SAMPLERS[sampler].takes_schedule else ("default",)
    cases = [(n, schedule, "leading") for n in (1, 2, 3, 1000) for schedule in schedules]
    cases += [(n, "default", spacing) for n in (1, 2, 999, 1000) for spacing in ("trailing", "linspace")]
    for steps, schedule, spacing in cases:
        try:
            table = build(sampler, steps, SchedulerConfig(), schedule=schedule, spacing=spacing)
        except FastsdError as error:
            assert error.argument == "num_inference_steps" and "\n" not in str(error)
        else:
            assert np.isfinite(table.rows).all() and len(table) > 0
