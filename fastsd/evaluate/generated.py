"""The images that a measurement generates: captions drawn from the data, a seed for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastsd.errors import FastsdError
from fastsd.evaluate.images import Pixels, RealImages
from fastsd.evaluate.metrics import Prompt

if TYPE_CHECKING:
    from fastsd.pipeline import Pipeline

BATCH = 25  # affects the speed, not the images
Progress = Callable[[str], None]


def choose_prompts(real: RealImages, count: int, seed: int) -> list[Prompt]:
    """`count` captions in random order, each once; where there are fewer, from the start again."""
    pairs = [Prompt(text, source) for source, image in enumerate(real.images) for text in image.captions]
    order = np.random.default_rng(seed).permutation(len(pairs))
    return [pairs[order[k % len(order)]] for k in range(count)]


def generate(
    pipe: Pipeline, prompts: Sequence[str], seed: int, settings: dict[str, Any], progress: Progress
) -> list[Pixels]:
    """An image `[H, W, 3]` for each prompt; the k-th has seed `seed + k`.

    Raises:
        FastsdError: the settings do not fit the model.
    """
    images: list[Pixels] = []
    for start in range(0, len(prompts), BATCH):
        part = list(prompts[start : start + BATCH])
        # Plain: a caption with brackets is a text, not the syntax of prompts.
        result = pipe(part, seed=seed + start, batch_size=len(part), **({"prompt_syntax": "plain"} | settings))
        images += [np.asarray(image.convert("RGB")) for image in result.images]
        progress(f"{len(images)} of {len(prompts)} images generated")
    if any(image.shape != images[0].shape for image in images):
        raise FastsdError("the images have different sizes, which no metric compares")
    return images
