"""A folder of Playground 2.5's kind, in fastsd and in diffusers: scheduler, network, latents by channel, pixels."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastsd.pipeline import Pipeline
from tests.support.families import TOLERANCE, generator, latents_of
from tests.support.matching import relative_error

MEAN, STD = [-1.6574, 1.886, -1.383, 2.5155], [8.4927, 5.9022, 6.5498, 5.2299]  # Playground 2.5's
SIZES = {"height": 64, "width": 64}


@pytest.fixture(scope="module", params=["EDMDPMSolverMultistepScheduler", "EDMEulerScheduler"])
def playground(request: pytest.FixtureRequest, families: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    import diffusers

    folder = tmp_path_factory.mktemp("edm") / "model"
    shutil.copytree(families.folder / "sdxl", folder)
    getattr(diffusers, request.param)().save_pretrained(folder / "scheduler")
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae")
    vae.register_to_config(latents_mean=MEAN, latents_std=STD, scaling_factor=0.5)
    vae.save_pretrained(folder / "vae")
    scheduler = diffusers.__dict__[request.param].from_pretrained(folder / "scheduler")
    return folder, {**families.pipelines["sdxl"].components, "vae": vae, "scheduler": scheduler}


def test_images_agree_with_diffusers(playground: tuple[Path, dict[str, Any]]) -> None:
    import diffusers

    folder, parts = playground
    theirs = diffusers.StableDiffusionXLPipeline(**parts)
    theirs.set_progress_bar_config(disable=True)
    ours = Pipeline.from_pretrained(folder, device="cpu", dtype="fp32")
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    how = {"num_inference_steps": 6, "guidance_scale": 3.0}
    expected = latents_of(theirs, "a cat", latents=noise, generator=generator(1), **SIZES, **how)
    found = ours("a cat", latents=noise, seed=1, output_type="latent", **SIZES, **how).images
    assert relative_error(found, expected) < TOLERANCE
    image = theirs("a cat", latents=noise, generator=generator(1), output_type="np", **SIZES, **how).images
    drawn = ours("a cat", latents=noise, seed=1, **SIZES, **how).images[0]
    assert np.abs(np.asarray(drawn) / 255 - image[0]).max() < 1.5 / 255  # half a level, and the last bit of either


def test_images_from_an_image_agree_with_diffusers(playground: tuple[Path, dict[str, Any]]) -> None:
    import diffusers

    folder, parts = playground
    theirs = diffusers.StableDiffusionXLImg2ImgPipeline(**parts)
    theirs.set_progress_bar_config(disable=True)
    ours = Pipeline.from_pretrained(folder, device="cpu", dtype="fp32")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    how = {"num_inference_steps": 6, "guidance_scale": 3.0, "strength": 0.6, "image": image}
    expected = latents_of(theirs, "a cat", generator=generator(1), **how)
    found = ours("a cat", seed=1, output_type="latent", **how).images
    assert relative_error(found, expected) < TOLERANCE
