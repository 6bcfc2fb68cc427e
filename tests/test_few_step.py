"""Which files are recognised as few-step models, and which settings take precedence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fastsd.config import SchedulerConfig
from fastsd.errors import FastsdError
from fastsd.few_step import KINDS, Detection
from fastsd.generate.defaults import Defaults, steps_from_image
from fastsd.pipeline import Pipeline
from fastsd.weights.adapters.apply import Adapter
from fastsd.weights.few_step import detect_in_metadata, detect_in_scheduler
from tests.support import original

PLAIN = SchedulerConfig(sampler="euler")
TRAILING = replace(PLAIN, timestep_spacing="trailing")


def kind_name(detection: Detection | None) -> str | None:
    return None if detection is None else detection.kind.name


@pytest.mark.parametrize(
    ("config", "xl", "kind"),
    [
        (PLAIN, True, None),
        (replace(PLAIN, sampler="lcm"), False, "lcm"),
        (TRAILING, True, "lightning"),  # as its model card sets it
        (replace(TRAILING, prediction_type="sample"), True, "lightning-1"),
        (TRAILING, False, "turbo"),  # sd-turbo's folder; Lightning exists for SDXL only
        (replace(TRAILING, sampler="euler_a"), True, "turbo"),  # sdxl-turbo's folder
        (
            replace(TRAILING, prediction_type="v_prediction"),
            True,
            None,
        ),  # models trained with v need the usual number of steps
        (replace(TRAILING, rescale_betas_zero_snr=True), False, None),
        (replace(TRAILING, schedule="karras"), True, None),
        (replace(TRAILING, sampler="ddim"), False, None),  # Hyper-SD's, but not only
        (replace(TRAILING, sampler="dpm++2m"), False, None),
    ],
)
def test_a_schedulers_kind(config: SchedulerConfig, xl: bool, kind: str | None) -> None:
    assert kind_name(detect_in_scheduler(config, xl)) == kind


@pytest.mark.parametrize(
    ("metadata", "kind"),
    [
        ({}, None),
        ({"modelspec.architecture": "stable-diffusion-xl-turbo-v1"}, "turbo"),  # of Stability's own file
        ({"modelspec.architecture": "stable-diffusion-xl-v1-base"}, None),
        ({"modelspec.architecture": "stable-diffusion-v1/lora", "modelspec.tags": "style, LCM"}, "lcm"),
        ({"modelspec.tags": "Hyper-SD"}, "hyper"),
        ({"modelspec.tags": "hyperrealistic, lightning bolts"}, None),
        # Its parent's name and its title do not say how it is sampled.
        ({"ss_sd_model_name": "sdxl-turbo.safetensors", "modelspec.title": "my turbo"}, None),
        ({"fastsd.few_step": "lightning-1"}, "lightning-1"),
        ({"fastsd.few_step": "fastest"}, None),
    ],
)
def test_the_kind_in_metadata(metadata: dict[str, str], kind: str | None) -> None:
    assert kind_name(detect_in_metadata(metadata)) == kind


def test_a_kind_changes_only_what_it_states() -> None:
    base = SchedulerConfig(schedule="karras", sampler="dpm++2m")
    for kind in KINDS.values():
        changed = kind.scheduler(base)
        assert changed.sampler in kind.samplers and changed.schedule == "default"
        assert changed.timestep_spacing == kind.spacing
        assert changed.prediction_type == (kind.prediction or "epsilon")
        own = replace(base, sampler=kind.samplers[-1], timestep_spacing="trailing", schedule="default")
        assert kind.scheduler(own).sampler == kind.samplers[-1], "a checkpoint keeps a sampler of this kind"


def test_the_precedence_of_settings() -> None:
    """The call's, the flag's, the checkpoint author's, those that the files imply; in this order."""
    components = original.components("sd1")
    components.few_step = detect_in_metadata({"fastsd.few_step": "turbo"})
    components.defaults = {"num_inference_steps": 3}
    detected, chosen = Defaults(components), Defaults(components, "lightning")
    assert detected.settings(detected.few_step())["num_inference_steps"] == 3
    assert detected.settings(detected.few_step())["guidance_scale"] == 1.0
    assert chosen.settings(chosen.few_step())["num_inference_steps"] == 4
    assert Defaults(components, "none").few_step() is None
    one_step = Defaults(components, "lightning-1")
    assert one_step.scheduler(one_step.few_step()) == replace(
        components.scheduler, sampler="euler", timestep_spacing="trailing", prediction_type="sample"
    )
    with_prediction = Defaults(components, "lightning-1", prediction="epsilon")
    assert with_prediction.scheduler(with_prediction.few_step()).prediction_type == "epsilon"
    pipe = Pipeline(components, torch.device("cpu"), torch.float32)
    result = pipe("x", num_inference_steps=2, guidance_scale=3.0, sampler="ddim", output_type="latent")
    used = [result.parameters[key] for key in ("num_inference_steps", "guidance_scale", "sampler", "few_step")]
    assert used == [2, 3.0, "ddim", "turbo"]
    with pytest.raises(FastsdError, match="few_step is 'fast'; it should be one of lcm, turbo"):
        Pipeline.from_pretrained(few_step="fast")


def test_a_turbo_model_generates_at_its_own_training_size() -> None:
    components = replace(original.components("sd1"), sample_size=256)
    base_side = 256 * components.vae.config.downscale
    for kind, side in ((None, base_side), ("lightning", base_side), ("turbo", 512)):
        defaults = Defaults(components, kind)
        settings = defaults.settings(defaults.few_step())
        assert settings["width"] == settings["height"] == side


def test_from_an_image_at_least_one_step_runs() -> None:
    assert [steps_from_image(1, strength) for strength in (1.0, 0.8, 0.5, 0.3)] == [1, 2, 2, 4]
    assert steps_from_image(4, 0.5) == 4 and steps_from_image(1, "much") == 1 and steps_from_image(1, 0) == 1
    for strength in (0.8, 0.5, 0.3, 0.01):
        assert int(steps_from_image(1, strength) * strength) >= 1
    pipe = Pipeline(original.components("sd1"), torch.device("cpu"), torch.float32, few_step="turbo")
    image = Image.new("RGB", (64, 64), "red")
    result = pipe("x", image=image, strength=0.4, seed=0)
    assert result.parameters["num_inference_steps"] == 3 and result.images[0].tobytes() != image.tobytes()


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_v"
    tensors = {f"{layer}.lora_down.weight": torch.ones(2, 32), f"{layer}.lora_up.weight": torch.ones(32, 2)}
    save_file(tensors, tmp_path / "quick.safetensors", {"modelspec.tags": "lcm"})
    return tmp_path / "quick.safetensors"


def test_an_adapters_kind_applies_while_it_is_set(lora: Path) -> None:
    """At strength 0 it does not."""
    pipe = Pipeline(original.components("sd1"), torch.device("cpu"), torch.float32)
    before, scheduler = pipe.defaults, pipe.components.scheduler
    pipe.set_adapters([Adapter(lora)])
    assert (pipe.defaults["sampler"], pipe.defaults["num_inference_steps"], kind_name(pipe.few_step)) == (
        "lcm",
        4,
        "lcm",
    )
    result = pipe("x", negative_prompt="y", output_type="latent")
    assert "quick.safetensors's metadata says so" in result.notes[0] and "negative prompt has no effect" in str(result)
    for adapters in ([Adapter(lora, 0.0)], []):
        pipe.set_adapters(adapters)
        assert pipe.few_step is None and pipe.defaults == before and pipe.components.scheduler == scheduler
    refusing = Pipeline(original.components("sd1"), torch.device("cpu"), torch.float32, few_step="none")
    refusing.set_adapters([Adapter(lora)])
    assert refusing.few_step is None and refusing.defaults == before
