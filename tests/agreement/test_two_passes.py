"""A refiner for the last steps, and the hires fix, against two of diffusers' pipelines one after the other."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastsd import FastsdError, Pipeline
from tests.support.families import TOLERANCE, Families, generator, latents_of
from tests.support.matching import relative_error

SETTINGS: dict[str, Any] = {"num_inference_steps": 10, "guidance_scale": 4.0, "negative_prompt": "blue"}


def theirs(families: Families, pipeline_class: str, family: str, scheduler: str) -> Any:
    """diffusers' pipeline with another scheduler."""
    import diffusers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        extra = {} if family in ("sdxl", "refiner") else {"safety_checker": None}
        pipe = getattr(diffusers, pipeline_class).from_pretrained(families.folder / family, **extra)
    changes = {"clip_sample": False} if scheduler == "DDIMScheduler" else {}
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config, **changes)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("switch", [0.8, 0.35])
@pytest.mark.parametrize(("sampler", "scheduler"), [("euler", "EulerDiscreteScheduler"), ("ddim", "DDIMScheduler")])
def test_base_and_refiner(families: Families, sampler: str, scheduler: str, switch: float) -> None:
    """With samplers that have no history. Others keep it when the refiner takes over; diffusers' start without one."""
    base = theirs(families, "StableDiffusionXLPipeline", "sdxl", scheduler)
    refiner = theirs(families, "StableDiffusionXLImg2ImgPipeline", "refiner", scheduler)
    arguments = {**SETTINGS, "generator": generator(3)}
    half_done = latents_of(base, "a cat", denoising_end=switch, height=64, width=64, **arguments)
    expected = latents_of(refiner, "a cat", denoising_start=switch, image=half_done, **arguments)
    pipe = Pipeline.from_pretrained(
        families.folder / "sdxl", device="cpu", dtype="fp32", refiner=families.folder / "refiner"
    )
    arguments = {**SETTINGS, "seed": 3, "sampler": sampler, "output_type": "latent"}
    assert relative_error(pipe("a cat", refiner_switch=switch, **arguments).images, expected) < TOLERANCE
    assert relative_error(pipe("a cat", refiner_switch=1.0, **arguments).images, expected) > 100 * TOLERANCE


def test_the_refiner_decodes_with_the_models_autoencoder(families: Families) -> None:
    pipe = Pipeline.from_pretrained(
        families.folder / "sdxl", device="cpu", dtype="fp32", refiner=families.folder / "refiner"
    )
    assert pipe.refiner is not None and pipe.refiner.vae is pipe.components.vae


@pytest.mark.parametrize(("family", "message"), [("sd2", "prediction_type"), ("inpainting", "4 and 9"), ("sd1", "XL")])
def test_a_refiner_of_another_family_is_refused(families: Families, family: str, message: str) -> None:
    with pytest.raises(FastsdError, match=message):
        Pipeline.from_pretrained(families.folder / "sdxl", device="cpu", dtype="fp32", refiner=families.folder / family)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_second_pass_over_latents(families: Families, family: str) -> None:
    pipe = Pipeline.from_pretrained(families.folder / family, device="cpu", dtype="fp32")
    arguments = {**SETTINGS, "seed": 3, "output_type": "latent"}
    latents = pipe("a cat", hires_scale=1.5, hires_strength=0.6, hires_steps=7, **arguments).images
    small = pipe("a cat", **arguments).images
    large = torch.nn.functional.interpolate(small, scale_factor=1.5, mode="bilinear")
    pipeline_class = "StableDiffusionImg2ImgPipeline" if family == "sd1" else "StableDiffusionXLImg2ImgPipeline"
    scheduler = "DDIMScheduler" if family == "sd1" else "EulerDiscreteScheduler"
    second = {**SETTINGS, "num_inference_steps": 7, "strength": 0.6, "generator": generator(3)}
    expected = latents_of(theirs(families, pipeline_class, family, scheduler), "a cat", image=large, **second)
    assert latents.shape == (1, 4, 12, 12)
    assert relative_error(latents, expected) < TOLERANCE


def test_a_second_pass_over_images_is_two_calls(families: Families) -> None:
    """The hires fix with Lanczos equals image-to-image on the enlarged image, bit for bit, in a batch too."""
    pipe = Pipeline.from_pretrained(families.folder / "sd1", device="cpu", dtype="fp32")
    arguments: dict[str, Any] = {**SETTINGS, "seed": 3, "sampler": "euler_a"}
    result = pipe(
        ["a cat", "a dog"], hires_scale=1.5, hires_strength=0.6, hires_upscaler="lanczos", batch_size=2, **arguments
    )
    small = pipe(["a cat", "a dog"], batch_size=2, **arguments)
    for i, prompt in enumerate(("a cat", "a dog")):
        large = small.images[i].resize((96, 96), Image.Resampling.LANCZOS)
        expected = pipe(prompt, image=large, strength=0.6, **(arguments | {"seed": 3 + i})).images[0]
        assert np.array_equal(np.asarray(result.images[i]), np.asarray(expected))
    assert result.parameters["hires_scale"] == 1.5 and result.parameters["hires_upscaler"] == "lanczos"
    assert (result.parameters["width"], result.images[0].width) == (64, 96)


def test_steps_are_counted_over_both_passes(families: Families) -> None:
    pipe = Pipeline.from_pretrained(families.folder / "sd1", device="cpu", dtype="fp32")
    steps = list(pipe.stream("a cat", hires_scale=2, hires_strength=0.5, num_inference_steps=4, seed=1))
    assert [step.index for step in steps] == [1, 2, 3, 4, 5, 6] and {step.total for step in steps} == {6}
    assert [step.preview().size for step in steps] == [(64, 64)] * 4 + [(128, 128)] * 2
