"""What a program written for diffusers met when it called fastsd instead, from one thread or from several."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from fastsd.errors import FastsdError
from fastsd.pipeline import Pipeline
from tests.support.families import TOLERANCE, Families, latents_of
from tests.support.matching import relative_error
from tests.support.pipelines import MASK, PHOTO, latents, tiny_pipeline


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Families:
    return Families(tmp_path_factory.mktemp("families"))


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("family", "pipeline_class", "more"),
    [
        ("sd1", "StableDiffusionImg2ImgPipeline", {"strength": 0.6}),
        ("sdxl", "StableDiffusionXLImg2ImgPipeline", {"strength": 0.6}),
        ("sd1", "StableDiffusionInpaintPipeline", {"strength": 0.6, "mask_image": MASK}),
        ("inpainting", "StableDiffusionInpaintPipeline", {"strength": 1.0, "mask_image": MASK}),
    ],
)
def test_two_images_from_one_image_and_generator_are_diffusers(
    families: Families, family: str, pipeline_class: str, more: dict[str, Any]
) -> None:
    """diffusers encodes the image once, with one draw, and starts both from it (`prepare_latents`)."""
    import diffusers

    extra = {} if family == "sdxl" else {"safety_checker": None}
    theirs = getattr(diffusers, pipeline_class).from_pretrained(families.folder / family, **extra)
    theirs.set_progress_bar_config(disable=True)
    pipe = Pipeline.from_pretrained(families.folder / family, device="cpu", dtype="fp32")
    arguments = {"image": PHOTO, "num_inference_steps": 5, "guidance_scale": 4.0, "num_images_per_prompt": 2, **more}
    expected = latents_of(theirs, "a cat", generator=torch.Generator().manual_seed(3), **arguments)
    found = latents_of(pipe, "a cat", generator=torch.Generator().manual_seed(3), **arguments)
    assert relative_error(found, expected) < TOLERANCE


def test_interrupt_in_a_callback_ends_its_own_call_alone() -> None:
    """A server streams one image and makes another: the second's cancel used to end the first, and its start undid a
    cancel."""
    pipe = tiny_pipeline()
    expected = latents(pipe)
    stream = pipe.stream("a cat", seed=1, output_type="latent")
    next(stream)
    seen = []

    def stop(own: Any, step: int, timestep: Any, tensors: Any) -> None:
        own._interrupt = True
        seen.append((step, own._interrupt))

    pipe("a dog", seed=2, callback_on_step_end=stop)
    assert seen == [(0, True)] and not pipe._interrupt
    last = list(stream)[-1]
    assert last.result is not None and torch.equal(last.result.images, expected)


def test_interrupt_from_elsewhere_survives_the_start_of_another_call() -> None:
    pipe = tiny_pipeline()
    stream = pipe.stream("a cat", seed=1, output_type="latent")
    next(stream)
    pipe._interrupt = True
    assert not pipe("a dog", seed=2).notes
    last = list(stream)[-1]
    assert last.result is not None and last.result.notes == ["interrupted after step 1 of 3"]
    assert not pipe._interrupt and not pipe("a cat", seed=1).notes


def test_a_copy_that_would_share_weights_is_refused() -> None:
    """`copy.copy(pipe).to(torch.float16)` used to convert the first pipeline's weights too."""
    with pytest.raises(FastsdError, match="copy.deepcopy"):
        copy.copy(tiny_pipeline())
