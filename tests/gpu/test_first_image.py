"""One image of the bundled model on the GPU: that of the CPU, as closely as the rounding of its dtype allows."""

from __future__ import annotations

import warnings

import pytest
import torch

from bench.bench_images import pixels
from bench.measure import distance, image_limit
from fastsd.pipeline import Pipeline
from fastsd.runtime.devices import DTYPES

pytestmark = pytest.mark.gpu
GUIDANCE = 3.0


def image_of(device: str, dtype: str) -> torch.Tensor:
    """`[1, H, W, 3]` in [0, 1]. A warning (a graph that is not captured, a candidate that fails) is an error."""
    pipe = Pipeline.from_pretrained(None, device, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return pixels(pipe("a handwritten eight", seed=1, num_inference_steps=8, guidance_scale=GUIDANCE).images)


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_the_first_image_is_that_of_the_cpu(dtype: str) -> None:
    found = distance(image_of("cuda", dtype), image_of("cpu", "fp32"))
    assert found.psnr >= image_limit(DTYPES[dtype], GUIDANCE), found
