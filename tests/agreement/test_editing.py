"""Models that read an image beside the latent agree with diffusers: InstructPix2Pix and SD 2's depth model."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastsd.pipeline import Pipeline
from fastsd.weights import save_folder
from tests.support.families import TOLERANCE, generator, latents_of
from tests.support.matching import relative_error
from tests.support.pipelines import PHOTO

EDITING = ("pix2pix", "sdxl pix2pix", "sdxl pix2pix scaled")
# A map of other proportions than the image, with sharp edges: bicubic without antialiasing overshoots there.
DEPTH = Image.fromarray(np.random.RandomState(4).randint(0, 65536, (40, 56)).astype(np.uint16))


@functools.cache
def ours(folder: Any) -> Pipeline:
    return Pipeline.from_pretrained(folder, device="cpu", dtype="fp32")


@pytest.mark.parametrize("scales", [(7.5, 1.5), (4.0, 1.0), (1.0, 1.5), (4.0, 0.9)], ids=str)
@pytest.mark.parametrize("family", EDITING)
def test_editing(families: Any, family: str, scales: tuple[float, float]) -> None:
    """Guided by text and image; and unguided where either scale turns guidance off."""
    arguments: dict[str, Any] = {
        "image": PHOTO,
        "num_inference_steps": 6,
        "guidance_scale": scales[0],
        "image_guidance_scale": scales[1],
    }
    theirs = {"height": 64, "width": 64} if family != "pix2pix" else {}
    expected = latents_of(
        families.pipelines[family], "make it blue", negative_prompt="fog", generator=generator(3), **arguments, **theirs
    )
    found = latents_of(ours(families.folder / family), "make it blue", negative_prompt="fog", seed=3, **arguments)
    assert relative_error(found, expected) < TOLERANCE


def test_editing_without_a_negative_prompt_rescaled(families: Any) -> None:
    """SDXL's empty negative prompt is zeros, for both of the samples without the text."""
    arguments: dict[str, Any] = {
        "image": PHOTO,
        "num_inference_steps": 4,
        "guidance_scale": 5.0,
        "guidance_rescale": 0.6,
    }
    theirs = families.pipelines["sdxl pix2pix"]
    expected = latents_of(theirs, "blue", generator=generator(5), height=64, width=64, **arguments)
    found = latents_of(ours(families.folder / "sdxl pix2pix"), "blue", seed=5, **arguments)
    assert relative_error(found, expected) < TOLERANCE


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_depth(families: Any, strength: float, guidance: float) -> None:
    """From an image and a map of 16 bits and another size."""
    values = torch.from_numpy(np.asarray(DEPTH).astype(np.float32))[None]
    arguments: dict[str, Any] = {
        "image": PHOTO,
        "strength": strength,
        "num_inference_steps": 6,
        "guidance_scale": guidance,
    }
    theirs = families.pipelines["depth"]
    expected = latents_of(theirs, "a room", depth_map=values, generator=generator(7), **arguments)
    found = latents_of(ours(families.folder / "depth"), "a room", depth_image=DEPTH, seed=7, **arguments)
    assert relative_error(found, expected) < TOLERANCE


@pytest.mark.parametrize("family", ["pix2pix", "depth"])
def test_a_folder_that_fastsd_saves_opens_as_its_pipeline(families: Any, family: str, tmp_path: Any) -> None:
    import diffusers

    folder = families.folder / family
    pipe = ours(folder)
    save_folder(pipe.components, tmp_path, torch.float32)
    # A depth model needs the network that measures depth, which fastsd neither reads nor writes, or None for it.
    absent = {"depth_estimator": None, "feature_extractor": None} if family == "depth" else {}
    opened = diffusers.DiffusionPipeline.from_pretrained(tmp_path, **absent)
    assert type(opened) is type(families.pipelines[family])
    expected = families.pipelines[family].unet.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in opened.unet.state_dict().items())
