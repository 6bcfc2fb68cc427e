"""A refiner for the last steps, a second pass over an enlarged image: as diffusers' pipelines one after another."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastsd import FastsdError, Pipeline
from tests.support.families import Families

TOLERANCE = 1e-4
SETTINGS: dict[str, Any] = {"num_inference_steps": 10, "guidance_scale": 4.0, "negative_prompt": "blue"}


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def generator(seed: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed)]


def theirs(families: Families, kind: str, family: str, scheduler: str) -> Any:
    import diffusers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        extra = {} if family in ("sdxl", "refiner") else {"safety_checker": None}
        pipe = getattr(diffusers, kind).from_pretrained(families.folder / family, **extra)
    own = {"clip_sample": False, "set_alpha_to_one": False} if scheduler == "DDIMScheduler" else {}
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config, **own)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: Any, **arguments: Any) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pipe("a cat", output_type="latent", **arguments).images


@pytest.mark.parametrize("switch", [0.8, 0.35])
@pytest.mark.parametrize(("sampler", "scheduler"), [("euler", "EulerDiscreteScheduler"), ("ddim", "DDIMScheduler")])
def test_base_and_refiner(families: Families, sampler: str, scheduler: str, switch: float) -> None:
    """Of samplers without a memory: others keep theirs over the change here, where diffusers' start anew."""
    base = theirs(families, "StableDiffusionXLPipeline", "sdxl", scheduler)
    second = theirs(families, "StableDiffusionXLImg2ImgPipeline", "refiner", scheduler)
    arguments = {**SETTINGS, "generator": generator(3)}
    half_done = run(base, denoising_end=switch, height=64, width=64, **arguments)
    wanted = run(second, denoising_start=switch, image=half_done, **arguments)
    pipe = Pipeline.from_pretrained(
        families.folder / "sdxl", device="cpu", dtype="fp32", refiner=families.folder / "refiner"
    )
    arguments = {**SETTINGS, "seed": 3, "sampler": sampler, "output_type": "latent"}
    found = pipe("a cat", refiner_switch=switch, **arguments).images
    assert error(found, wanted) < TOLERANCE
    assert error(pipe("a cat", refiner_switch=1.0, **arguments).images, wanted) > 100 * TOLERANCE


def test_the_refiner_decodes_with_the_models_autoencoder(families: Families) -> None:
    pipe = Pipeline.from_pretrained(
        families.folder / "sdxl", device="cpu", dtype="fp32", refiner=families.folder / "refiner"
    )
    assert pipe.refiner is not None and pipe.refiner.vae is pipe.components.vae


@pytest.mark.parametrize(("family", "said"), [("sd2", "prediction_type"), ("inpainting", "inpainting"), ("sd1", "XL")])
def test_a_refiner_of_another_family_is_refused(families: Families, family: str, said: str) -> None:
    with pytest.raises(FastsdError, match=said):
        Pipeline.from_pretrained(families.folder / "sdxl", device="cpu", dtype="fp32", refiner=families.folder / family)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_second_pass_over_latents(families: Families, family: str) -> None:
    pipe = Pipeline.from_pretrained(families.folder / family, device="cpu", dtype="fp32")
    arguments = {**SETTINGS, "seed": 3, "output_type": "latent"}
    found = pipe("a cat", hires_scale=1.5, hires_strength=0.6, hires_steps=7, **arguments).images
    small = pipe("a cat", **arguments).images
    large = torch.nn.functional.interpolate(small, scale_factor=1.5, mode="bilinear")
    kind = "StableDiffusionImg2ImgPipeline" if family == "sd1" else "StableDiffusionXLImg2ImgPipeline"
    scheduler = "DDIMScheduler" if family == "sd1" else "EulerDiscreteScheduler"
    own = {**SETTINGS, "num_inference_steps": 7, "strength": 0.6, "generator": generator(3)}
    wanted = run(theirs(families, kind, family, scheduler), image=large, **own)
    assert found.shape == (1, 4, 12, 12)
    assert error(found, wanted) < TOLERANCE


def test_a_second_pass_over_images_is_two_calls(families: Families) -> None:
    """Enlarged by Lanczos and drawn over: what a user can do by hand, to the bit, for every image of a batch."""
    pipe = Pipeline.from_pretrained(families.folder / "sd1", device="cpu", dtype="fp32")
    arguments: dict[str, Any] = {**SETTINGS, "seed": 3, "sampler": "euler_a"}
    found = pipe(
        ["a cat", "a dog"], hires_scale=1.5, hires_strength=0.6, hires_upscaler="lanczos", batch_size=2, **arguments
    )
    small = pipe(["a cat", "a dog"], batch_size=2, **arguments)
    for i, prompt in enumerate(("a cat", "a dog")):
        large = small.images[i].resize((96, 96), Image.Resampling.LANCZOS)
        wanted = pipe(prompt, image=large, strength=0.6, **(arguments | {"seed": 3 + i})).images[0]
        assert np.array_equal(np.asarray(found.images[i]), np.asarray(wanted))
    assert found.parameters["hires_scale"] == 1.5 and found.parameters["hires_upscaler"] == "lanczos"
    assert (found.parameters["width"], found.images[0].width) == (64, 96)


def test_steps_are_counted_over_both_passes(families: Families) -> None:
    pipe = Pipeline.from_pretrained(families.folder / "sd1", device="cpu", dtype="fp32")
    steps = list(pipe.stream("a cat", hires_scale=2, hires_strength=0.5, num_inference_steps=4, seed=1))
    assert [step.index for step in steps] == [1, 2, 3, 4, 5, 6] and {step.total for step in steps} == {6}
    assert [step.preview().size for step in steps] == [(64, 64)] * 4 + [(128, 128)] * 2
