"""A guidance scale for each image: the image of a call of its own with that scale."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fastsd import FastsdError, Pipeline
from fastsd.parameters import PARAMETERS
from tests.support import tiny
from tests.support.pipelines import MASK, PHOTO, graphed_pipeline, latents, tiny_pipeline

MODES: dict[str, dict[str, Any]] = {
    "text": {},
    "image": {"image": PHOTO, "strength": 0.7},
    "mask": {"image": PHOTO, "mask_image": MASK, "strength": 0.7},
    "hires": {"hires_scale": 1.5, "hires_strength": 0.7, "hires_steps": 4},
    "rescaled": {"guidance_rescale": 0.7},
    "a1111": {"like": "a1111"},
}
LONG = "fog over hills " * 30  # two chunks
SCALES = [3.0, 1.0, 3.0, 3.0, 0.0]


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("mode", MODES)
def test_each_image_is_as_in_a_call_with_its_scale(mode: str, batch_size: int) -> None:
    """Scales without guidance among them, whose images a long negative prompt does not touch."""
    pipe = tiny_pipeline()
    same: dict[str, Any] = {"negative_prompt": LONG, **MODES[mode]}
    several = {"num_images_per_prompt": len(SCALES), "batch_size": batch_size}
    found = latents(pipe, guidance_scale=SCALES, seed=5, **several, **same)
    for i, scale in enumerate(SCALES):
        assert torch.equal(found[i], latents(pipe, guidance_scale=scale, seed=5 + i, **same)[0])
    assert not torch.equal(found[0], latents(pipe, guidance_scale=2, seed=5, **same)[0])


def test_a_scale_for_each_prompt() -> None:
    pipe = tiny_pipeline()
    prompts = ["a cat", "a dog on a mat"]
    found = latents(pipe, prompts, guidance_scale=[2, 5], num_images_per_prompt=2)
    each = latents(pipe, prompts, guidance_scale=[2, 2, 5, 5], num_images_per_prompt=2)
    assert torch.equal(found, each)
    assert torch.equal(found[3], latents(pipe, prompts[1], guidance_scale=5, seed=4)[0])


@pytest.mark.parametrize("given", [torch.tensor([2.0, 5.0]), np.array([2.0, 5.0]), (2, 5)], ids=["pt", "np", "tuple"])
def test_tensors_arrays_and_tuples(given: Any) -> None:
    pipe = tiny_pipeline()
    prompts = ["a cat", "a dog"]
    assert torch.equal(latents(pipe, prompts, guidance_scale=given), latents(pipe, prompts, guidance_scale=[2, 5]))


def test_each_images_settings_hold_its_scale() -> None:
    """So the settings of an image repeat it."""
    pipe = tiny_pipeline()
    result = pipe(["a cat", "a dog"], guidance_scale=[2, 5], seed=1)
    assert [one["guidance_scale"] for one in result.own] == [2.0, 5.0]
    assert result.parameters["guidance_scale"] == [2.0, 5.0]
    alike = pipe(["a cat", "a dog"], guidance_scale=[2, 2], seed=1)
    assert alike.parameters["guidance_scale"] == 2.0
    assert isinstance((result.parameters | result.own[1])["guidance_scale"], PARAMETERS["guidance_scale"].kind.stored)


def test_a_scale_that_is_an_input_of_the_network() -> None:
    """LCM's UNets read it (Luo et al. 2023, section 4.2)."""
    unet = replace(tiny.UNET, time_cond_proj_dim=16)
    components = tiny.sd1(unet, replace(tiny.VAE, block_out_channels=(8, 8, 16, 16)))
    components.defaults = {"num_inference_steps": 2}
    pipe = Pipeline(components, torch.device("cpu"), torch.float32)
    found = latents(pipe, ["a cat"] * 3, guidance_scale=[2, 8, 8])
    alone = [latents(pipe, guidance_scale=scale, seed=1 + i)[0] for i, scale in enumerate([2, 8, 8])]
    assert torch.equal(found, torch.stack(alone))
    assert not torch.equal(found[1], latents(pipe, guidance_scale=2, seed=2)[0])


def test_graphs_serve_every_scale() -> None:
    pipe, _ = graphed_pipeline()
    plain = tiny_pipeline()
    for scales in ([2, 5, 1], [1, 1, 4]):
        prompts = ["a cat"] * 3
        assert torch.equal(
            latents(pipe, prompts, guidance_scale=scales), latents(plain, prompts, guidance_scale=scales)
        )


def test_features_beside_a_text_count_for_guided_images_alone() -> None:
    """An image without guidance reads no negative features, so its prompt fills what chunks it likes."""
    pipe = tiny_pipeline()
    negative = torch.randn(1, 77, 32, generator=torch.Generator().manual_seed(1))
    same = {"seed": 1, "negative_prompt_embeds": negative, "output_type": "latent"}
    found = pipe(["a cat", LONG], guidance_scale=[4, 1], **same).images
    assert torch.equal(found[0], pipe("a cat", guidance_scale=4, **same).images[0])
    assert torch.equal(found[1], latents(pipe, LONG, guidance_scale=1, seed=2)[0])
    with pytest.raises(FastsdError, match="^negative_prompt_embeds: it has 77 tokens and the text beside it 154"):
        pipe(["a cat", LONG], guidance_scale=[4, 2], **same)


def test_a_negative_prompt_without_effect_on_some_images_is_said() -> None:
    pipe = tiny_pipeline()
    notes = pipe(["a cat"] * 2, negative_prompt="fog", guidance_scale=[1, 4], seed=1).notes
    assert any(note.startswith("the negative prompt has no effect on some images") for note in notes)
    assert not any("negative" in note for note in pipe(["a cat"] * 2, guidance_scale=[1, 4], seed=1).notes)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ([2, 3, 4], "^guidance_scale: 3 numbers for 2 prompts and 4 images; give one, or as many"),
        ([2], "^guidance_scale: 1 number for 2 prompts and 4 images"),
        ([], "^guidance_scale is .*number from 0 to 100"),
        ([2, -1], "^guidance_scale is -1; it should be a number from 0 to 100"),
        ([2, float("nan")], "^guidance_scale is nan"),
        ([[2, 3]], "^guidance_scale is "),
        (["2", "3"], "^guidance_scale is '2'"),
    ],
)
def test_what_does_not_fit_is_refused(given: Any, line: str) -> None:
    with pytest.raises(FastsdError, match=line):
        tiny_pipeline()(["a cat", "a dog"], guidance_scale=given, num_images_per_prompt=2)
