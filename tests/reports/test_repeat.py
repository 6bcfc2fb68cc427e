"""Reports of images that do not come again: in batches, at odd step counts, and from other programs' settings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fastsd.config import SchedulerConfig
from fastsd.errors import FastsdError
from fastsd.generate.like import LIKE
from fastsd.generate.noise import SOURCES
from fastsd.generate.tables import make_table
from fastsd.parameters import Settings
from fastsd.sampling.samplers import SAMPLERS
from tests.support.cli import pixels
from tests.support.pipelines import tiny_pipeline

VARIED = {"seed": 5, "subseed": 3, "subseed_strength": 0.4, "num_inference_steps": 1, "num_images_per_prompt": 3}


@pytest.mark.parametrize("noise", SOURCES)
def test_a_variation_in_a_batch_comes_again_by_its_own_settings(noise: str) -> None:
    """Image k of a call is image 0 of a call with the settings that are stored for it, at any batch size.

    One generator draws for a whole batch, so there its second noise has one seed too (as the first has).
    """
    pipe = tiny_pipeline()
    varied = VARIED | {"noise": noise, "width": 16, "height": 16}
    together = pipe("a cat", batch_size=3, **varied)
    assert len({image.tobytes() for image in together.images}) == 3
    for image, one_by_one, own in zip(
        together.images, pipe("a cat", batch_size=1, **varied).images, together.own, strict=True
    ):
        again = pipe("a cat", **varied | own | {"num_images_per_prompt": 1}).images[0]
        np.testing.assert_array_equal(image, again)
        np.testing.assert_array_equal(image, one_by_one)


@pytest.mark.heavy
@pytest.mark.parametrize("like", LIKE)
def test_a_variation_of_the_command_line_comes_again(like: str, cli: Callable, model: Path) -> None:
    flags = ("--seed", 5, "--subseed", 3, "--subseed-strength", 0.4, "--like", like, "-W", 16, "-H", 16)
    for batch in (1, 2, 3):
        ran = cli("-p", "a cat", "-m", model, *flags, "--count", 3, "-b", batch, "-o", f"{batch}.png")
        for path in ran.paths:
            again = cli("--from-image", path, "-m", model, "-o", f"again-{path.name}")
            np.testing.assert_array_equal(pixels(path), pixels(again.paths[0]))
            np.testing.assert_array_equal(pixels(path), pixels(path.with_name(path.name.replace(f"{batch}-", "1-", 1))))


@pytest.mark.parametrize("like", LIKE)
def test_few_steps_make_calls_or_are_refused(like: str) -> None:
    """A1111's DDIM makes N - 1 calls, so 1 step would decode noise (its modules/sd_samplers_timesteps_impl.py)."""
    refused = set()
    for sampler in SAMPLERS:
        for steps in (1, 2, 3):
            settings = Settings(like=like, sampler=sampler, schedule="default", spacing=None, eta=0.0)
            try:
                assert len(make_table(settings, SchedulerConfig(), steps, steps)) > 0
            except FastsdError as error:
                assert error.argument == "num_inference_steps"
                refused.add((sampler, steps))
    assert refused == ({("ddim", 1)} if like == "a1111" else set())
