"""The bundled models open in diffusers and generate the same images there."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch

from fastsd.bundled import BUNDLED
from fastsd.pipeline import Pipeline
from tests.support.families import TOLERANCE

# "zebra" is in none of the digits' captions.
PROMPTS = {"digits": ["a thick eight slanted right", "3", "zebra"], "emoji": ["woman firefighter"]}
LATENTS = {"digits": (1, 4, 8, 8), "emoji": (1, 8, 8, 8)}


@pytest.fixture(scope="module", params=BUNDLED)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def theirs(name: str) -> Any:
    import diffusers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = diffusers.DiffusionPipeline.from_pretrained(BUNDLED[name], torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_its_scheduler_is_fastsds(theirs: Any) -> None:
    config = theirs.scheduler.config
    assert type(theirs.scheduler).__name__ == "DDIMScheduler"
    assert (config.prediction_type, config.timestep_spacing) == ("v_prediction", "trailing")
    assert config.rescale_betas_zero_snr


def test_the_same_images_at_the_default_settings(theirs: Any, name: str) -> None:
    ours = Pipeline.from_pretrained(name, device="cpu", dtype="fp32")
    noise = torch.randn(LATENTS[name], generator=torch.Generator().manual_seed(5))
    settings: dict[str, Any] = {
        "num_inference_steps": ours.defaults["num_inference_steps"],
        "guidance_scale": ours.defaults["guidance_scale"],
    }
    for prompt in PROMPTS[name]:
        expected = theirs(prompt, height=64, width=64, latents=noise.clone(), output_type="np", **settings).images
        images = ours(prompt, latents=noise, output_type="np", **settings).images
        # Of the range, 1, as latents: neither side rounds.
        assert np.abs(images - expected).max() < TOLERANCE, prompt
        assert expected.max() > 0.9, prompt  # strokes, or the paper that an emoji is on


def test_an_emoji_has_the_colours_of_its_prompt() -> None:
    pipe = Pipeline.from_pretrained("emoji", device="cpu", dtype="fp32")
    heart, japan = (pipe(prompt, seed=0, output_type="np").images[0] for prompt in ("a red heart", "flag of japan"))
    for image in (heart, japan):  # red in the middle
        assert image[26:36, 26:36, 0].mean() > image[26:36, 26:36, 1:].mean() + 0.5
    assert heart[0].min() > 0.9 and heart[-1].min() > 0.9  # white around it
    assert japan[20:44, 10].min() > 0.7  # and the flag is white beside its sun
