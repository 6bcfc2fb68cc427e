"""Image prompts in a call: what is refused, what stays the same, and that a captured graph reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fastsd import FastsdError, ImagePrompt, Pipeline
from tests.support.ip_adapters import write_adapter
from tests.support.pipelines import MASK, PHOTO, graphed_pipeline, latents, tiny_pipeline

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("ip"), tiny_pipeline().components.unet, "resampler")


def test_a_graph_reads_the_prompts_of_its_call(adapter: Path) -> None:
    eager = tiny_pipeline()
    graphed, recorder = graphed_pipeline()
    graphed.components.unet.load_state_dict(eager.components.unet.state_dict())
    other = Image.new("RGB", (40, 40), "green")
    calls: list[Any] = [[(PHOTO, 1.0, None)], [(other, 0.5, None)], [(PHOTO, 0.7, MASK), (other, 0.4, None)], []]
    for pairs in (calls, calls[::-1]):
        for call in pairs:
            found = [
                latents(
                    pipe,
                    image_prompts=[ImagePrompt(pipe.load_ip_adapter(adapter), *one) for one in call],
                    guidance_scale=3.0,
                )
                for pipe in (eager, graphed)
            ]
            torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_a_scale_of_0_changes_nothing(adapter: Path) -> None:
    pipe = tiny_pipeline()
    prompt = ImagePrompt(pipe.load_ip_adapter(adapter), PHOTO, 0.0)
    assert torch.equal(latents(pipe, image_prompts=[prompt]), latents(pipe))


def test_the_batch_changes_no_image(adapter: Path) -> None:
    pipe = tiny_pipeline()
    prompts = [ImagePrompt(pipe.load_ip_adapter(adapter), PHOTO)]
    two = latents(pipe, ["a cat", "a dog"], image_prompts=prompts, seed=4)
    torch.testing.assert_close(two[1:], latents(pipe, "a dog", image_prompts=prompts, seed=5), rtol=1e-4, atol=1e-4)


def test_what_is_wrong_is_named(adapter: Path) -> None:
    pipe = tiny_pipeline()
    own = pipe.load_ip_adapter(adapter)
    half = tiny_pipeline(dtype=torch.bfloat16)
    wrong: list[tuple[Pipeline, Any, str]] = [
        (pipe, [PHOTO], "image_prompts: should be a list of fastsd.ImagePrompt"),
        (pipe, [ImagePrompt(own, "a.png")], r"image_prompts\[0\].images: should be a PIL image, not str"),
        (pipe, [ImagePrompt(own, [])], r"image_prompts\[0\].images: 0 images; 1 to 16 are read"),
        (pipe, [ImagePrompt(own, PHOTO, 11.0)], r"image_prompts\[0\].scale is 11"),
        (pipe, [ImagePrompt(pipe.components.unet, PHOTO)], r"image_prompts\[0\].adapter: should come from"),  # type: ignore[arg-type]
        (half, [ImagePrompt(own, PHOTO)], "it is fp32 on cpu and the model bf16 on cpu"),
    ]
    for one, prompts, said in wrong:
        with pytest.raises(FastsdError, match=said):
            one("x", image_prompts=prompts)
