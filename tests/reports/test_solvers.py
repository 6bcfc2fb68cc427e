"""What people reported of samplers and schedules that other programs' images name, or that they know by those names."""

from __future__ import annotations

import diffusers
import pytest

from fastsd.errors import FastsdError
from fastsd.image.infotext import parse_parameters
from fastsd.sampling.samplers import SAMPLERS, SCHEDULES, resolve

# A1111 1.10: modules/sd_samplers_kdiffusion.py, sd_samplers_timesteps.py, sd_samplers_lcm.py.
A1111 = {
    "DPM++ 2M": "dpm++2m",
    "DPM++ SDE": "dpm++sde",
    "DPM++ 2M SDE": "dpm++2m_sde",
    "DPM++ 2M SDE Heun": "dpm++2m_sde_heun",
    "DPM++ 2S a": "dpm++2s_a",
    "DPM++ 3M SDE": "dpm++3m_sde",
    "Euler a": "euler_a",
    "Euler": "euler",
    "LMS": "lms",
    "Heun": "heun",
    "DPM2": "dpm2",
    "DPM2 a": "dpm2_a",
    "DPM fast": "dpm_fast",
    "DPM adaptive": None,
    "Restart": "restart",
    "DDIM": "ddim",
    "DDIM CFG++": None,
    "PLMS": "pndm",
    "UniPC": "unipc",
    "LCM": "lcm",
}
# The short names there, and those of versions before 1.6, which had the schedule in the name.
A1111_ALIASES = {
    "k_euler_a": ("euler_a", "default"),
    "k_euler_ancestral": ("euler_a", "default"),
    "k_lms_ka": ("lms", "karras"),
    "k_dpm_2_a_ka": ("dpm2_a", "karras"),
    "k_dpmpp_2s_a_ka": ("dpm++2s_a", "karras"),
    "k_dpmpp_2m_sde_ka": ("dpm++2m_sde", "karras"),
    "k_dpm_fast": ("dpm_fast", "default"),
    "k_dpmpp_3m_sde": ("dpm++3m_sde", "default"),
    "restart": ("restart", "default"),
    "DPM2 Karras": ("dpm2", "karras"),
    "DPM2 a Karras": ("dpm2_a", "karras"),
    "DPM++ 2S a Karras": ("dpm++2s_a", "karras"),
    "DPM++ 2M SDE Heun Exponential": ("dpm++2m_sde_heun", "exponential"),
    "DPM++ 3M SDE Karras": ("dpm++3m_sde", "karras"),
    "DPM++ 3M SDE Exponential": ("dpm++3m_sde", "exponential"),
    "Euler a SGM Uniform": ("euler_a", "sgm_uniform"),
    "Euler SGMUniform": ("euler", "sgm_uniform"),
    "Euler AYS SDXL": None,
}
# Forge: modules_forge/alter_samplers.py and modules/sd_samplers_kdiffusion.py.
FORGE = {
    "DPM++ 2M Turbo": ("dpm++2m", "turbo"),
    "DPM++ 2M SDE Turbo": ("dpm++2m_sde", "turbo"),
    "HeunPP2": ("heun++", "default"),
    "IPNDM": ("ipndm", "default"),
    "IPNDM_V": ("ipndm_v", "default"),
    "DEIS": ("deis", "default"),
    "DDPM": ("ddpm", "default"),
    "Euler CFG++": None,
    "Euler a CFG++": None,
    "DPM++ 2S a CFG++": None,
    "DPM++ 2M CFG++": None,
}
# ComfyUI: KSAMPLER_NAMES and SAMPLER_NAMES in comfy/samplers.py.
COMFY = {
    "euler": "euler",
    "euler_cfg_pp": None,
    "euler_ancestral": "euler_a",
    "euler_ancestral_cfg_pp": None,
    "heun": "heun",
    "heunpp2": "heun++",
    "exp_heun_2_x0": "exp_heun",
    "exp_heun_2_x0_sde": "exp_heun_sde",
    "dpm_2": "dpm2",
    "dpm_2_ancestral": "dpm2_a",
    "lms": "lms",
    "dpm_fast": "dpm_fast",
    "dpm_adaptive": None,
    "dpmpp_2s_ancestral": "dpm++2s_a",
    "dpmpp_2s_ancestral_cfg_pp": None,
    "dpmpp_sde": "dpm++sde",
    "dpmpp_sde_gpu": "dpm++sde",
    "dpmpp_2m": "dpm++2m",
    "dpmpp_2m_cfg_pp": None,
    "dpmpp_2m_sde": "dpm++2m_sde",
    "dpmpp_2m_sde_gpu": "dpm++2m_sde",
    "dpmpp_2m_sde_heun": "dpm++2m_sde_heun",
    "dpmpp_2m_sde_heun_gpu": "dpm++2m_sde_heun",
    "dpmpp_3m_sde": "dpm++3m_sde",
    "dpmpp_3m_sde_gpu": "dpm++3m_sde",
    "ddpm": "ddpm",
    "lcm": "lcm",
    "ipndm": "ipndm",
    "ipndm_v": "ipndm_v",
    "deis": "deis",
    "cfgpp_ud10_ab": None,
    "res_multistep": "res_multistep",
    "res_multistep_cfg_pp": None,
    "res_multistep_ancestral": "res_multistep_a",
    "res_multistep_ancestral_cfg_pp": None,
    "gradient_estimation": "gradient_estimation",
    "gradient_estimation_cfg_pp": None,
    "er_sde": "er_sde",
    "seeds_2": "seeds_2",
    "seeds_3": "seeds_3",
    "sa_solver": "sa_solver",
    "sa_solver_pece": None,
    "ddim": "ddim",
    "uni_pc": "unipc",
    "uni_pc_bh2": "unipc",
}
# modules/sd_schedulers.py of A1111 and Forge; SCHEDULER_NAMES of ComfyUI; the labels that images have.
SPELLED_SCHEDULES = {
    "Automatic": "default",
    "Uniform": "default",
    "Karras": "karras",
    "Exponential": "exponential",
    "Polyexponential": "exponential",
    "SGM Uniform": "sgm_uniform",
    "SGMUniform": "sgm_uniform",
    "KL Optimal": "kl_optimal",
    "Align Your Steps": "align_your_steps",
    "Align Your Steps 11": "align_your_steps",
    "Align Your Steps 32": "align_your_steps_32",
    "Align Your Steps GITS": "align_your_steps_gits",
    "Simple": "simple",
    "Normal": "normal",
    "DDIM": "ddim_uniform",
    "Beta": "beta",
    "Turbo": "turbo",
    "simple": "simple",
    "sgm_uniform": "sgm_uniform",
    "karras": "karras",
    "exponential": "exponential",
    "ddim_uniform": "ddim_uniform",
    "beta": "beta",
    "normal": "normal",
    "linear_quadratic": "linear_quadratic",
    "kl_optimal": "kl_optimal",
}


def refused(name: str) -> str:
    """The line by which a sampler is refused."""
    with pytest.raises(FastsdError) as caught:
        resolve(name)
    return str(caught.value)


@pytest.mark.parametrize(("name", "ours"), [*A1111.items(), *COMFY.items()])
def test_every_sampler_of_a1111_and_comfyui_runs_or_is_refused_with_the_reason(name: str, ours: str | None) -> None:
    """Their own lists: one resolves to ours, or a line says why no table can follow it and which is the nearest."""
    if ours is not None:
        assert resolve(name) == (ours, "default")
        return
    line = refused(name)
    assert line.startswith(f"sampler: {name!r}: it") and "\n" not in line
    assert line.rsplit("the nearest is ", 1)[1] in SAMPLERS


@pytest.mark.parametrize(("name", "ours"), [*A1111_ALIASES.items(), *FORGE.items()])
def test_short_names_and_names_with_a_schedule_are_understood(name: str, ours: tuple[str, str] | None) -> None:
    if ours is None:
        assert "\n" not in refused(name)
    else:
        assert resolve(name) == ours


@pytest.mark.parametrize("name", [name for name in dir(diffusers) if name.endswith("Scheduler")])
def test_every_scheduler_class_of_diffusers_runs_or_is_refused_with_the_reason(name: str) -> None:
    try:
        sampler, _ = resolve(name)
    except FastsdError as error:
        assert "; the nearest is " in str(error) and str(error).rsplit("the nearest is ", 1)[1] in SAMPLERS
    else:
        assert sampler in SAMPLERS


@pytest.mark.parametrize(("name", "ours"), SPELLED_SCHEDULES.items())
def test_every_schedule_of_a1111_forge_and_comfyui_is_understood(name: str, ours: str) -> None:
    assert resolve("euler", name) == ("euler", ours) and ours in SCHEDULES


@pytest.mark.parametrize("name", ["DPM adaptive", "dpm_adaptive", "k_dpm_ad"])
def test_dpm_adaptive_is_refused_because_its_steps_depend_on_the_data(name: str) -> None:
    assert refused(name) == f"sampler: {name!r}: its steps depend on the data; the nearest is dpm_fast"


@pytest.mark.parametrize(
    ("line", "sampler", "schedule"),
    [
        ("Sampler: DPM2 a, Schedule type: Karras", "dpm2_a", "karras"),
        ("Sampler: DPM++ 2S a, Schedule type: Automatic", "dpm++2s_a", None),
        ("Sampler: DPM++ 3M SDE, Schedule type: Exponential", "dpm++3m_sde", "exponential"),
        ("Sampler: Restart, Schedule type: Beta", "restart", "beta"),
        ("Sampler: Euler, Schedule type: Align Your Steps", "euler", "align_your_steps"),
        ("Sampler: Euler a, Schedule type: KL Optimal", "euler_a", "kl_optimal"),
        ("Sampler: Euler, Schedule type: Turbo", "euler", "turbo"),
        ("Sampler: DPM++ 2M SDE Heun, Schedule type: DDIM", "dpm++2m_sde_heun", "ddim_uniform"),
    ],
)
def test_the_settings_in_an_image_name_them(line: str, sampler: str, schedule: str | None) -> None:
    text = f"a cat\nSteps: 20, {line}, CFG scale: 7, Seed: 1, Size: 512x512"
    settings, _ = parse_parameters(text)
    assert settings["sampler"] == sampler
    if schedule is not None:
        assert settings["schedule"] == schedule
