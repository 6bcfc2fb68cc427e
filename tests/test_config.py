"""The presets against the JSON files of the published models, written out here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastsd import config
from fastsd.errors import FastsdError
from fastsd.sampling.samplers import complete
from fastsd.weights.layouts import configs, unet_config
from fastsd.weights.layouts.scheduler import CLASS_OF_SAMPLER, SAMPLER_OF_CLASS, read_scheduler, write_scheduler

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"


def unet(down: list[str], heads: Any, context: int, size: int, **more: Any) -> dict[str, Any]:
    """A published unet/config.json."""
    widths = [320, 640, 1280, 1280][: len(down)]
    return {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": heads,
        "block_out_channels": widths,
        "center_input_sample": False,
        "cross_attention_dim": context,
        "down_block_types": down,
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 4,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "out_channels": 4,
        "sample_size": size,
        "up_block_types": [name.replace("Down", "Up") for name in reversed(down)],
        **more,
    }


SD15 = unet([CROSS, CROSS, CROSS, PLAIN], 8, 768, 64)
SD21 = unet([CROSS, CROSS, CROSS, PLAIN], [5, 10, 20, 20], 1024, 96, use_linear_projection=True)
SDXL = unet(
    [PLAIN, CROSS, CROSS],
    [5, 10, 20],
    2048,
    128,
    use_linear_projection=True,
    transformer_layers_per_block=[1, 2, 10],
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
REFINER = unet(
    [PLAIN, CROSS, CROSS, PLAIN],
    [6, 12, 24, 24],
    1280,
    128,
    use_linear_projection=True,
    transformer_layers_per_block=4,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2560,
    block_out_channels=[384, 768, 1536, 1536],
)


@pytest.mark.parametrize(
    ("published", "preset"),
    [
        (SD15, config.SD15_UNET),
        (SD21, config.SD21_UNET),
        (SDXL, config.SDXL_UNET),
        (REFINER, config.SDXL_REFINER_UNET),
        (SD15 | {"in_channels": 9}, config.replace(config.SD15_UNET, in_channels=9)),
    ],
    ids=["SD1.5", "SD2.1", "SDXL", "refiner", "inpainting"],
)
def test_unet_configs(published: dict[str, Any], preset: config.UNetConfig, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(published))
    assert unet_config.read_unet(file) == (preset, published["sample_size"])
    file.write_text(json.dumps(unet_config.write_unet(preset, published["sample_size"])))
    assert unet_config.read_unet(file) == (preset, published["sample_size"])


VAE = {
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}


def test_autoencoder_configs(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(VAE | {"sample_size": 512}))  # SD1.5's has no scaling_factor
    assert configs.read_vae(file) == config.SD_VAE
    file.write_text(json.dumps(VAE | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True}))
    assert configs.read_vae(file) == config.SDXL_VAE


def text(hidden: int, layers: int, heads: int, act: str, projection: int, **more: Any) -> dict[str, Any]:
    return {
        "architectures": ["CLIPTextModel"],
        "bos_token_id": 0,
        "eos_token_id": 2,
        "hidden_act": act,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 77,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "projection_dim": projection,
        "vocab_size": 49408,
        **more,
    }


@pytest.mark.parametrize(
    ("published", "preset"),
    [
        (text(768, 12, 12, "quick_gelu", 768), config.CLIP_L),
        (text(1024, 23, 16, "gelu", 512), config.OPENCLIP_H),
        (text(1280, 32, 20, "gelu", 1280, architectures=["CLIPTextModelWithProjection"]), config.OPENCLIP_BIGG),
    ],
    ids=["CLIP-L", "OpenCLIP-H", "OpenCLIP-bigG"],
)
def test_text_encoder_configs(published: dict[str, Any], preset: config.CLIPConfig, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(published))
    # These files have transformers' old end token, 2, which stands for "the largest id of a text".
    assert configs.read_clip(file) == config.replace(preset, eos_token_id=2, eos_is_largest_id=True)
    file.write_text(json.dumps(published | {"eos_token_id": 49407}))
    assert configs.read_clip(file) == preset


PNDM = {  # SD1.5's scheduler/scheduler_config.json, from before prediction_type and timestep_spacing
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
DDIM = PNDM | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}  # SD2.1's
EULER = PNDM | {  # SDXL's, base and refiner
    "_class_name": "EulerDiscreteScheduler",
    "interpolation_type": "linear",
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
}


@pytest.mark.parametrize(
    ("published", "preset"),
    [
        (PNDM, config.SchedulerConfig()),
        (DDIM, config.SchedulerConfig(prediction_type="v_prediction", sampler="ddim")),
        (EULER, config.SchedulerConfig(sampler="euler", timestep_spacing="leading")),
    ],
    ids=["SD1.5", "SD2.1", "SDXL"],
)
def test_scheduler_configs(published: dict[str, Any], preset: config.SchedulerConfig, tmp_path: Path) -> None:
    file = tmp_path / "scheduler_config.json"
    file.write_text(json.dumps(published))
    assert read_scheduler(file) == preset


SHARED = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type", "steps_offset")


@pytest.mark.parametrize("class_name", SAMPLER_OF_CLASS)
def test_missing_keys_of_a_scheduler_file_have_diffusers_defaults(class_name: str, tmp_path: Path) -> None:
    """Old folders name a class and little else; diffusers then uses that class's defaults."""
    import inspect

    import diffusers

    if getattr(diffusers, class_name).__module__.startswith("diffusers.utils.dummy"):
        pytest.skip("diffusers needs torchsde for it")
    file = tmp_path / "scheduler_config.json"
    file.write_text(json.dumps({"_class_name": class_name}))
    ours = read_scheduler(file, as_stated=True)  # the pipelines of SD 1 and 2 correct its offset
    ours = complete(ours, ours.sampler)
    defaults = {key: p.default for key, p in inspect.signature(getattr(diffusers, class_name)).parameters.items()}
    for key in (*SHARED, "timestep_spacing", "set_alpha_to_one", "rescale_betas_zero_snr"):
        if key in defaults:
            assert getattr(ours, key) == defaults[key], key
    assert ours.schedule == "default"


@pytest.mark.parametrize("sampler", sorted({*CLASS_OF_SAMPLER, "dpm++2m_sde"}))
def test_schedulers_survive_a_round_trip_and_open_in_diffusers(sampler: str, tmp_path: Path) -> None:
    import diffusers

    file = tmp_path / "scheduler_config.json"
    for schedule in ("default", "karras", "exponential"):
        ours = config.SchedulerConfig(
            num_train_timesteps=900,
            beta_end=0.013,
            prediction_type="v_prediction",
            timestep_spacing="trailing",
            sampler=sampler,
            schedule=schedule,
        )
        written = write_scheduler(ours)
        file.write_text(json.dumps(written))
        assert read_scheduler(file) == ours
        scheduler = getattr(diffusers, written["_class_name"])
        if scheduler.__module__.startswith("diffusers.utils.dummy"):
            continue  # needs torchsde
        theirs = scheduler.from_config(scheduler.load_config(tmp_path, subfolder=None)).config
        for key in SHARED:
            if key in theirs:
                assert theirs[key] == getattr(ours, key), key
        if f"use_{schedule}_sigmas" in theirs:
            assert theirs[f"use_{schedule}_sigmas"] is True


def test_schedulers_of_flow_models_are_refused(tmp_path: Path) -> None:
    """A flow model under the class name of another would generate noise."""
    file = tmp_path / "scheduler_config.json"
    for change in ({"use_flow_sigmas": True}, {"prediction_type": "flow_prediction"}):
        file.write_text(json.dumps(PNDM | {"_class_name": "DPMSolverMultistepScheduler"} | change))
        with pytest.raises(FastsdError, match=next(iter(change))):
            read_scheduler(file)
