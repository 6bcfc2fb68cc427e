"""The bundled model opens in diffusers, and draws the same image there."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch

from fastsd.pipeline import BUNDLED, Pipeline

PROMPTS = ["a thick eight slanted right", "3", "zebra"]  # the last is no word of its captions


@pytest.fixture(scope="module")
def theirs() -> Any:
    import diffusers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = diffusers.DiffusionPipeline.from_pretrained(BUNDLED, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_the_scheduler_is_the_one_that_fastsd_takes(theirs: Any) -> None:
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
    wanted = theirs(prompt, height=64, width=64, latents=noise.clone(), output_type="np", **settings).images
    found = ours(prompt, latents=noise, output_type="np", **settings).images
    assert np.abs(found - wanted).max() < 0.5 / 255 + 1e-4  # ours went through 8 bits
    assert wanted.max() > 0.9  # something is drawn
