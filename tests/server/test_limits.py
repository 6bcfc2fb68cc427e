from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

from fastsd.errors import FastsdError
from fastsd.server.limits import MAX_PROMPT, Limits


@pytest.mark.parametrize(
    ("arguments", "about"),
    [
        ({"num_images_per_prompt": 17}, "num_images_per_prompt"),
        ({"width": 2056}, "width"),
        ({"height": 1032, "hires_scale": 2.0}, "height"),
        ({"prompt": "x" * (MAX_PROMPT + 1)}, "prompt"),
        ({"negative_prompt": "x" * (MAX_PROMPT + 1)}, "negative_prompt"),
        ({"noise_count": 17}, "noise_count"),
        ({"noise_index": 16}, "noise_index"),
        ({"seed_resize_from": "8x2049"}, "seed_resize_from"),
    ],
)
def test_each_number_has_a_bound(arguments: dict[str, Any], about: str) -> None:
    with pytest.raises(FastsdError) as refused:
        Limits().check(arguments)
    assert refused.value.argument == about


def test_noise_may_be_drawn_for_as_much_as_is_generated() -> None:
    Limits().check({"noise_count": 16, "noise_index": 15, "seed_resize_from": "2048x2048"})


def test_all_together_have_one_too() -> None:
    """2048 x 2048 x 16 images x 32 steps is 2^31, the bound; a step more is beyond it, and so is a second pass."""
    largest = {"width": 2048, "height": 2048, "num_images_per_prompt": 16, "num_inference_steps": 32}
    Limits().check(largest)
    with pytest.raises(FastsdError, match="is 2.21e\\+09; at most 2.15e\\+09"):
        Limits().check(largest | {"num_inference_steps": 33})
    half = largest | {"width": 1024, "height": 1024, "hires_scale": 2.0}
    Limits().check(half | {"num_inference_steps": 25})  # 25 steps and, at 4 times the pixels, 25: as 125 in a quarter
    with pytest.raises(FastsdError, match="at most"):
        Limits().check(half | {"num_inference_steps": 26})


def test_without_sides_those_of_the_image_count_and_what_is_painted_around_it() -> None:
    own = Limits(side=2048)
    own.check({"image": Image.new("L", (2048, 2048)), "num_inference_steps": 10})
    with pytest.raises(FastsdError, match="2049x8 pixels; at most 2048 of a side are generated") as refused:
        own.check({"image": Image.new("L", (2049, 8))})
    assert refused.value.argument == "image"
    own.check({"image": Image.new("L", (2049, 8)), "width": 512})  # it is made smaller
    own.check({"image": Image.new("L", (8, 2000)), "outpaint": "0,40,0,8"})
    for added in ("0,41,0,8", "0,8192,0,0"):
        with pytest.raises(FastsdError, match="pixels; at most 2048") as refused:
            own.check({"image": Image.new("L", (8, 2000)), "outpaint": added, "width": 64, "height": 64})
        assert refused.value.argument == "image"


@pytest.mark.parametrize("name", ["timesteps", "sigmas"])
def test_a_list_of_steps_counts_as_many(name: str) -> None:
    size = {"width": 2048, "height": 2048}  # 2^22 pixels: 512 steps are the bound
    Limits().check(size | {name: ",".join(map(str, range(512, 0, -1)))})
    with pytest.raises(FastsdError, match="at most"):
        Limits().check(size | {name: ",".join(map(str, range(513, 0, -1)))})
