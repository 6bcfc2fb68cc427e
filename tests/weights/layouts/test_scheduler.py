"""Every setting of every diffusers scheduler that a sampler stands for: followed as in diffusers, noted, or refused."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastsd.errors import FastsdError
from fastsd.sampling.build import build
from fastsd.sampling.samplers import SAMPLERS, UNFOLLOWED
from fastsd.weights.layouts.scheduler import SAMPLER_OF_CLASS, read_scheduler
from tests.support.lifted import Case, difference, reference, run_table, scheduler_class

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers", "ignore::FutureWarning")

TOLERANCE = 1e-9  # see tests/sampling/test_diffusers.py
BASE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}
BETAS = tuple(np.linspace(1e-4, 0.015, 1000).tolist())
MINIMUM = {"final_sigmas_type": "sigma_min"}  # DPM-Solver on the noise needs it
# Values other than the default, with what else has to be stated.
VALUES: dict[str, list[dict[str, Any]]] = {
    "num_train_timesteps": [{"num_train_timesteps": 900}],
    "beta_start": [{"beta_start": 0.001}],
    "beta_end": [{"beta_end": 0.015}],
    "beta_schedule": [{"beta_schedule": name} for name in ("linear", "squaredcos_cap_v2", "exp", "laplace", "sigmoid")],
    "trained_betas": [{"trained_betas": BETAS}],
    "prediction_type": [{"prediction_type": name} for name in ("epsilon", "sample", "flow_prediction")],
    "timestep_spacing": [{"timestep_spacing": name} for name in ("leading", "trailing", "linspace")],
    "steps_offset": [{"steps_offset": 1, "timestep_spacing": "leading"}, {"steps_offset": 3}],
    "rescale_betas_zero_snr": [{"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}],
    "set_alpha_to_one": [{"set_alpha_to_one": True}, {"set_alpha_to_one": False}],
    "solver_order": [{"solver_order": order} for order in (1, 3)],
    "solver_type": [{"solver_type": name} for name in ("midpoint", "heun", "bh1", "bh2", "logrho")]
    + [{"solver_type": name, "solver_order": 3, **MINIMUM} for name in ("heun", "bh1", "bh2")]
    + [{"solver_type": "bh1", **MINIMUM}],  # at noise 0 diffusers multiplies infinity by 0
    "algorithm_type": [
        {"algorithm_type": name, "solver_order": order, "solver_type": kind, **MINIMUM}
        for name in ("dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver")
        for order in (1, 2, 3)
        for kind in ("midpoint", "heun")
    ]
    + [
        {"algorithm_type": "deis"},
        {"algorithm_type": "data_prediction"},
        {"algorithm_type": "noise_prediction"},
        {"algorithm_type": "sde-dpmsolver++", "solver_order": 3},
    ],
    "lower_order_final": [{"lower_order_final": value, "solver_order": n} for value in (True, False) for n in (2, 3)],
    "euler_at_final": [{"euler_at_final": True, **MINIMUM}],
    "final_sigmas_type": [MINIMUM],
    "use_karras_sigmas": [{"use_karras_sigmas": True}, {"use_karras_sigmas": True, **MINIMUM}],
    "use_exponential_sigmas": [{"use_exponential_sigmas": True}],
    "use_beta_sigmas": [{"use_beta_sigmas": True}],
    "use_lu_lambdas": [{"use_lu_lambdas": True}],
    "use_flow_sigmas": [{"use_flow_sigmas": True}],
    "use_dynamic_shifting": [{"use_dynamic_shifting": True}],
    "lambda_min_clipped": [
        {"lambda_min_clipped": -2.0, "timestep_spacing": name} for name in ("leading", "trailing", "linspace")
    ],
    "variance_type": [{"variance_type": "fixed_small_log"}, {"variance_type": "fixed_large"}]
    + [{"variance_type": name} for name in ("fixed_large_log", "learned", "learned_range")],
    "interpolation_type": [{"interpolation_type": "log_linear"}],
    "timestep_type": [{"timestep_type": "continuous"}, {"timestep_type": "continuous", "use_karras_sigmas": True}],
    "sigma_min": [{"sigma_min": 0.05, "use_karras_sigmas": True}, {"sigma_min": 0.05}],
    "sigma_max": [{"sigma_max": 80.0, "use_karras_sigmas": True}, {"sigma_max": 80.0, "use_exponential_sigmas": True}],
    "disable_corrector": [{"disable_corrector": (0, 2)}, {"disable_corrector": (1,), "solver_order": 3}],
    "predict_x0": [{"predict_x0": False, "solver_order": n, **MINIMUM} for n in (1, 2, 3)],
    "solver_p": [{"solver_p": "DPMSolverMultistepScheduler"}],
    "original_inference_steps": [{"original_inference_steps": 40}],
    "timestep_scaling": [{"timestep_scaling": 5.0}],
    "clip_sample": [{"clip_sample": True}],
    "thresholding": [{"thresholding": True}],
    "skip_prk_steps": [{"skip_prk_steps": False}],
    "shift_terminal": [{"shift_terminal": 0.1}],
    "predictor_order": [{"predictor_order": 3}],
    "corrector_order": [{"corrector_order": 1}],
    "tau_func": [{"tau_func": "?"}],
    "noise_sampler_seed": [{"noise_sampler_seed": 3}],  # the noise is the call's seed's
}
# They act only beside another setting, whose case covers them.
IDLE = {
    "dynamic_thresholding_ratio": "thresholding",
    "sample_max_value": "thresholding",
    "clip_sample_range": "clip_sample",
    "flow_shift": "use_flow_sigmas",
    "time_shift_type": "use_dynamic_shifting",
}
CASES = [
    (class_name, setting, values)
    for class_name in SAMPLER_OF_CLASS
    for setting in inspect.signature(scheduler_class(class_name).__init__).parameters
    if setting not in ("self", "args", "kwargs") and setting not in IDLE
    for values in VALUES.get(setting, [{setting: "?"}])
]
REQUIRED = {"ddpm": {"clip_sample": False}, "ddim": {"clip_sample": False}, "pndm": {"skip_prk_steps": True}}
WITHOUT_SAMPLE = ("pndm", "euler_a", "dpm++sde", "dpm2", "dpm2_a")  # see tests/sampling/test_diffusers.py
STEPS = (7, 16)


@pytest.mark.heavy
@pytest.mark.parametrize(("class_name", "setting", "values"), CASES)
def test_a_setting_is_followed_noted_or_refused(
    class_name: str, setting: str, values: dict[str, Any], tmp_path: Path
) -> None:
    sampler = SAMPLER_OF_CLASS[class_name]
    accepted = set(inspect.signature(scheduler_class(class_name).__init__).parameters)
    stated = {key: value for key, value in (BASE | REQUIRED.get(sampler, {}) | values).items() if key in accepted}
    file = tmp_path / "scheduler_config.json"
    file.write_text(json.dumps({"_class_name": class_name, **stated}))
    try:
        config = read_scheduler(file, as_stated=True)
        tables = [build(config.sampler, steps, config, schedule=config.schedule) for steps in STEPS]
    except FastsdError as error:
        assert any(key in str(error) for key in values) or diffusers_fails(
            Case(class_name, STEPS[0], tuple(stated.items()))
        ), error
        return
    if (sampler.startswith("dpm2"), setting) == (True, "use_karras_sigmas"):
        return  # differs on purpose: docs/samplers.md
    if setting in UNFOLLOWED:
        assert config.unfollowed == (setting,) and config.sampler in UNFOLLOWED[setting].samplers
        return
    step = (("eta", 0.0),) if sampler == "tcd" else ()
    for steps, table in zip(STEPS, tables):
        convert = config.prediction_type == "sample" and sampler in WITHOUT_SAMPLE
        arguments = stated | ({"prediction_type": "epsilon"} if convert else {})
        first = table.timesteps[0] if "use_exponential_sigmas" in stated else None  # rounding: docs/samplers.md
        case = Case(class_name, steps, tuple(arguments.items()), first=first, image_as_noise=convert, step=step)
        if diffusers_fails(case):
            continue
        theirs = reference(case)
        ours = run_table(table, False)
        assert ours.timesteps == pytest.approx(theirs.timesteps, abs=1e-6)
        if sampler == "sa_solver":  # it noises the known part of an inpainted image to the rounded timestep's level
            ours.keep = theirs.keep
        assert difference(ours, theirs) < TOLERANCE


def diffusers_fails(case: Case) -> bool:
    """Whether diffusers refuses the config, or runs into NaN."""
    try:
        run = reference(case)
    except (ValueError, NotImplementedError, UnboundLocalError, TypeError, RuntimeError, IndexError):
        return True
    return not bool(np.isfinite(run.states[-1].numpy()).all())


def test_every_setting_of_diffusers_is_tried() -> None:
    """A setting that a later diffusers adds fails here until it is followed, noted or refused."""
    tried = {setting for _, setting, _ in CASES}
    assert tried <= set(VALUES)
    assert set(UNFOLLOWED) <= tried
    assert {sampler for setting in UNFOLLOWED.values() for sampler in setting.samplers} <= set(SAMPLERS)
