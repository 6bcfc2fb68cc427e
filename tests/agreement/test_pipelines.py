"""Generated latents and images agree with diffusers' pipelines, from the same noise, to 1e-4 in fp32."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastsd.pipeline import Pipeline
from fastsd.sampling.samplers import SAMPLERS
from tests.support.families import TOLERANCE, generator, latents_of
from tests.support.matching import relative_error
from tests.support.pipelines import PHOTO

SCHEDULERS = {name: entry.diffusers for name, entry in SAMPLERS.items() if entry.diffusers}
SCHEDULERS["dpm++2m_sde"] = "DPMSolverMultistepScheduler"
del SCHEDULERS["dpm++sde"]  # diffusers samples its noise from a Brownian tree
SETTINGS = {
    "ddpm": {"clip_sample": False},  # as in every Stable Diffusion checkpoint; diffusers' default is for pixels
    "ddim": {"clip_sample": False},
    "pndm": {"skip_prk_steps": True},
    "dpm++2m_sde": {"algorithm_type": "sde-dpmsolver++"},
}


@functools.cache
def ours(folder: Any) -> Pipeline:
    return Pipeline.from_pretrained(folder, device="cpu", dtype="fp32")


@pytest.fixture(scope="module")
def mask() -> Image.Image:
    """Aligned to latent pixels, where both ways of shrinking a mask agree."""
    area = np.zeros((64, 64), dtype=np.uint8)
    area[16:48, 8:40] = 255
    return Image.fromarray(area)


@pytest.mark.parametrize("sampler", SCHEDULERS)
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_text_to_image(families: Any, family: str, sampler: str) -> None:
    import diffusers

    theirs = families.pipelines[family]
    scheduler_class = getattr(diffusers, SCHEDULERS[sampler])
    scheduler = theirs.scheduler
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    try:
        theirs.scheduler = scheduler_class.from_config(scheduler.config, **SETTINGS.get(sampler, {}))
        expected = latents_of(
            theirs,
            "a cat on a mat",
            negative_prompt="blue",
            num_inference_steps=6,
            guidance_scale=4.0,
            guidance_rescale=0.3,
            height=64,
            width=64,
            latents=noise.clone(),
            generator=generator(11),
        )
    finally:
        theirs.scheduler = scheduler
    latents = latents_of(
        ours(families.folder / family),
        "a cat on a mat",
        negative_prompt="blue",
        num_inference_steps=6,
        guidance_scale=4.0,
        guidance_rescale=0.3,
        latents=noise,
        seed=11,
        sampler=sampler,
    )
    assert relative_error(latents, expected) < TOLERANCE


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_images_without_a_negative_prompt(families: Any, family: str) -> None:
    """SDXL uses zeros for a missing negative prompt. Neither side rounds its images, which range from 0 to 1, so they
    agree as latents do; a rounding to 8 bits would be 20 times as much."""
    arguments: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 5.0, "width": 64, "height": 48}
    expected = families.pipelines[family]("a cat", generator=generator(7), output_type="np", **arguments).images
    images = ours(families.folder / family)("a cat", seed=7, output_type="np", **arguments).images
    assert np.abs(images - expected).max() < TOLERANCE


@pytest.mark.parametrize("family", ["sd1", "sdxl", "refiner"])
def test_image_to_image(families: Any, family: str) -> None:
    import diffusers

    pipeline_class = "StableDiffusionImg2ImgPipeline" if family == "sd1" else "StableDiffusionXLImg2ImgPipeline"
    theirs = getattr(diffusers, pipeline_class).from_pretrained(families.folder / family)
    theirs.set_progress_bar_config(disable=True)
    arguments: dict[str, Any] = {"image": PHOTO, "strength": 0.6, "num_inference_steps": 10, "guidance_scale": 4.0}
    expected = latents_of(theirs, "a cat", generator=generator(5), **arguments)
    latents = latents_of(ours(families.folder / family), "a cat", seed=5, **arguments)
    assert relative_error(latents, expected) < TOLERANCE


@pytest.mark.parametrize("strength", [1.0, 0.7])
@pytest.mark.parametrize("family", ["sd1", "inpainting"])
def test_inpainting(families: Any, family: str, strength: float, mask: Image.Image) -> None:
    import diffusers

    theirs = diffusers.StableDiffusionInpaintPipeline.from_pretrained(families.folder / family, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    arguments: dict[str, Any] = {"image": PHOTO, "mask_image": mask, "strength": strength, "guidance_scale": 4.0}
    arguments["num_inference_steps"] = 8
    expected = latents_of(theirs, "a cat", generator=generator(5), height=64, width=64, **arguments)
    latents = latents_of(ours(families.folder / family), "a cat", seed=5, **arguments)
    assert relative_error(latents, expected) < TOLERANCE
