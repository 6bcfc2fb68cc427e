"""One image of the bundled model on the GPU: that of the CPU, as closely as the rounding of its dtype allows."""

from __future__ import annotations

import pytest
import torch

from bench.bench_images import pixels
from bench.measure import distance, image_limit
from fastsd.pipeline import Pipeline
from tests.support.told import heard

pytestmark = pytest.mark.gpu
GUIDANCE = 3.0


def image_of(pipe: Pipeline) -> torch.Tensor:
    """`[1, H, W, 3]` in [0, 1]. A warning (a graph that is not captured, a candidate that fails) is an error."""
    with heard() as lines:
        images = pipe("a handwritten eight", seed=1, num_inference_steps=8, guidance_scale=GUIDANCE).images
    assert all(" is new here: every way" in line for line in lines), lines  # of a GPU's first use
    return pixels(images)


def test_the_first_image_is_that_of_the_cpu() -> None:
    pipe = Pipeline.from_pretrained(None, "cuda")
    found = distance(image_of(pipe), image_of(Pipeline.from_pretrained(None, "cpu", "fp32")))
    assert found.psnr >= image_limit(pipe.dtype, GUIDANCE), found
