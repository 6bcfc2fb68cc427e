"""Which files say that their model is of few steps, and whose settings win."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fastsd.config import SchedulerConfig
from fastsd.errors import FastsdError
from fastsd.few_step import KINDS
from fastsd.generate.defaults import Defaults, steps_from_image
from fastsd.pipeline import Pipeline
from fastsd.weights.adapters.apply import Adapter
from fastsd.weights.few_step import detect_in_metadata, detect_in_scheduler
from tests.support import original

PLAIN = SchedulerConfig(sampler="euler")
TRAILING = replace(PLAIN, timestep_spacing="trailing")


def name(said: Any) -> str | None:
    return said and said.kind.name


@pytest.mark.parametrize(
    ("config", "xl", "kind"),
    [
        (PLAIN, True, None),
        (replace(PLAIN, sampler="lcm"), False, "lcm"),
        (TRAILING, True, "lightning"),  # as its model card says to set it
        (replace(TRAILING, prediction_type="sample"), True, "lightning-1"),
        (TRAILING, False, "turbo"),  # sd-turbo's folder; Lightning is SDXL alone
        (replace(TRAILING, sampler="euler_a"), True, "turbo"),  # sdxl-turbo's folder
        (replace(TRAILING, prediction_type="v_prediction"), True, None),  # models trained with v take as many steps
        (replace(TRAILING, rescale_betas_zero_snr=True), False, None),
        (replace(TRAILING, schedule="karras"), True, None),
        (replace(TRAILING, sampler="ddim"), False, None),  # Hyper-SD's, and many another's
        (replace(TRAILING, sampler="dpm++2m"), False, None),
    ],
)
def test_what_a_scheduler_says(config: SchedulerConfig, xl: bool, kind: str | None) -> None:
    assert name(detect_in_scheduler(config, xl)) == kind


@pytest.mark.parametrize(
    ("metadata", "kind"),
    [
        ({}, None),
        ({"modelspec.architecture": "stable-diffusion-xl-turbo-v1"}, "turbo"),  # of Stability's own file
        ({"modelspec.architecture": "stable-diffusion-xl-v1-base"}, None),
        ({"modelspec.architecture": "stable-diffusion-v1/lora", "modelspec.tags": "style, LCM"}, "lcm"),
        ({"modelspec.tags": "Hyper-SD"}, "hyper"),
        ({"modelspec.tags": "hyperrealistic, lightning bolts"}, None),
        # What it was trained from, and what people call it, is not how it is sampled.
        ({"ss_sd_model_name": "sdxl-turbo.safetensors", "modelspec.title": "my turbo"}, None),
        ({"fastsd.few_step": "lightning-1"}, "lightning-1"),
        ({"fastsd.few_step": "fastest"}, None),
    ],
)
def test_what_metadata_say(metadata: dict[str, str], kind: str | None) -> None:
    assert name(detect_in_metadata(metadata)) == kind


def test_every_kind_changes_no_more_than_it_says() -> None:
    base = SchedulerConfig(schedule="karras", sampler="dpm++2m")
    for kind in KINDS.values():
        found = kind.scheduler(base)
        assert found.sampler in kind.samplers and found.schedule == "default"
        assert found.timestep_spacing == (kind.spacing or "leading")
        assert found.prediction_type == (kind.prediction or "epsilon")
        own = replace(base, sampler=kind.samplers[-1], timestep_spacing="trailing", schedule="default")
        assert kind.scheduler(own).sampler == kind.samplers[-1], "a checkpoint's own sampler of this kind is kept"


def test_whose_settings_win() -> None:
    """A call's own, those of the flag, the checkpoint's author's, what its files imply; in this order."""
    components = original.components("sd1")
    said = detect_in_metadata({"fastsd.few_step": "turbo"})
    components.few_step, components.defaults = said, {"num_inference_steps": 3}
    own, asked = Defaults(components), Defaults(components, "lightning")
    assert own.settings(own.few_step())["num_inference_steps"] == 3
    assert own.settings(own.few_step())["guidance_scale"] == 1.0
    assert asked.settings(asked.few_step())["num_inference_steps"] == 4
    assert Defaults(components, "none").few_step() is None
    assert Defaults(components, "lightning-1").scheduler(Defaults(components, "lightning-1").few_step()) == replace(
        components.scheduler, sampler="euler", timestep_spacing="trailing", prediction_type="sample"
    )
    told = Defaults(components, "lightning-1", prediction="epsilon")
    assert told.scheduler(told.few_step()).prediction_type == "epsilon"
    pipe = Pipeline(components, torch.device("cpu"), torch.float32)
    result = pipe("x", num_inference_steps=2, guidance_scale=3.0, sampler="ddim", output_type="latent")
    found = [result.parameters[key] for key in ("num_inference_steps", "guidance_scale", "sampler", "few_step")]
    assert found == [2, 3.0, "ddim", "turbo"]
    with pytest.raises(FastsdError, match="few_step is 'fast'; it should be one of lcm, turbo"):
        Pipeline.from_pretrained(few_step="fast")


def test_a_turbo_model_generates_at_the_size_that_it_was_trained_at() -> None:
    components = replace(original.components("sd1"), sample_size=256)
    side = 256 * components.vae.config.downscale
    for asked, wanted in ((None, side), ("lightning", side), ("turbo", 512)):
        own = Defaults(components, asked)
        settings = own.settings(own.few_step())
        assert settings["width"] == settings["height"] == wanted


def test_from_an_image_at_least_one_step_runs() -> None:
    assert [steps_from_image(1, strength) for strength in (1.0, 0.8, 0.5, 0.3)] == [1, 2, 2, 4]
    assert steps_from_image(4, 0.5) == 4 and steps_from_image(1, "much") == 1 and steps_from_image(1, 0) == 1
    for strength in (0.8, 0.5, 0.3, 0.01):
        assert int(steps_from_image(1, strength) * strength) >= 1
    pipe = Pipeline(original.components("sd1"), torch.device("cpu"), torch.float32, few_step="turbo")
    photo = Image.new("RGB", (64, 64), "red")
    result = pipe("x", image=photo, strength=0.4, seed=0)
    assert result.parameters["num_inference_steps"] == 3 and result.images[0].tobytes() != photo.tobytes()


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_v"
    tensors = {f"{layer}.lora_down.weight": torch.ones(2, 32), f"{layer}.lora_up.weight": torch.ones(32, 2)}
    save_file(tensors, tmp_path / "quick.safetensors", {"modelspec.tags": "lcm"})
    return tmp_path / "quick.safetensors"


def test_an_adapter_that_says_so(lora: Path) -> None:
    """The settings come with it and go with it; at strength 0 it says nothing."""
    pipe = Pipeline(original.components("sd1"), torch.device("cpu"), torch.float32)
    before, scheduler = pipe.defaults, pipe.components.scheduler
    pipe.set_adapters([Adapter(lora)])
    assert (pipe.defaults["sampler"], pipe.defaults["num_inference_steps"], name(pipe.few_step)) == ("lcm", 4, "lcm")
    result = pipe("x", negative_prompt="y", output_type="latent")
    assert "quick.safetensors's metadata says so" in result.notes[0] and "negative prompt has no effect" in str(result)
    for others in ([Adapter(lora, 0.0)], []):
        pipe.set_adapters(others)
        assert pipe.few_step is None and pipe.defaults == before and pipe.components.scheduler == scheduler
    asked = Pipeline(original.components("sd1"), torch.device("cpu"), torch.float32, few_step="none")
    asked.set_adapters([Adapter(lora)])
    assert asked.few_step is None and asked.defaults == before
