"""The bundled model opens in diffusers and generates the same images there."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch

from fastsd.bundled import BUNDLED
from fastsd.pipeline import Pipeline
from tests.support.families import TOLERANCE

PROMPTS = ["a thick eight slanted right", "3", "zebra"]  # the last word is in none of its captions


@pytest.fixture(scope="module")
def theirs() -> Any:
    import diffusers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = diffusers.DiffusionPipeline.from_pretrained(BUNDLED["digits"], torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_its_scheduler_is_fastsds(theirs: Any) -> None:
    config = theirs.scheduler.config
    assert type(theirs.scheduler).__name__ == "DDIMScheduler"
    assert (config.prediction_type, config.timestep_spacing) == ("v_prediction", "trailing")
    assert config.rescale_betas_zero_snr


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_same_image_at_the_default_settings(theirs: Any, prompt: str) -> None:
    ours = Pipeline.from_pretrained(device="cpu", dtype="fp32")
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    settings: dict[str, Any] = {
        "num_inference_steps": ours.defaults["num_inference_steps"],
        "guidance_scale": ours.defaults["guidance_scale"],
    }
    expected = theirs(prompt, height=64, width=64, latents=noise.clone(), output_type="np", **settings).images
    images = ours(prompt, latents=noise, output_type="np", **settings).images
    assert np.abs(images - expected).max() < TOLERANCE  # of the range, 1, as latents: neither side rounds
    assert expected.max() > 0.9  # there are strokes
