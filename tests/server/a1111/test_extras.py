from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

from fastsd.errors import FastsdError
from fastsd.server.a1111.bodies import Upscaling
from fastsd.server.a1111.extras import enlarge, read_upscaling, refuse_unsupported, unknown_fields
from tests.support.server import encoded

PIXELS = 2**20


def enlarged(image: Image.Image, **fields: Any) -> Image.Image:
    body = Upscaling(image=encoded(image), upscaler_1="Lanczos", **fields)
    return enlarge(body, read_upscaling(body, PIXELS))


@pytest.mark.parametrize("size, covering", [((64, 32), (128, 64)), ((32, 64), (64, 128))])
def test_an_image_of_another_shape_is_cut_to_the_size_and_not_stretched(
    size: tuple[int, int], covering: tuple[int, int]
) -> None:
    image = Image.linear_gradient("L").resize(size).convert("RGB")
    to = {"resize_mode": 1, "upscaling_resize_w": 64, "upscaling_resize_h": 64}
    whole = image.resize(covering, Image.Resampling.LANCZOS)
    left, top = ((side - 64) // 2 for side in covering)
    assert enlarged(image, **to).tobytes() == whole.crop((left, top, left + 64, top + 64)).tobytes()
    assert enlarged(image, **to, upscaling_crop=False).tobytes() == whole.tobytes()


def test_a_size_that_takes_too_many_pixels_on_its_way_is_refused() -> None:
    with pytest.raises(FastsdError, match="pixels; at most") as refused:
        enlarged(Image.new("RGB", (1000, 1)), resize_mode=1, upscaling_resize_w=64, upscaling_resize_h=64)
    assert refused.value.argument == "upscaling_resize_w"


def test_what_else_a1111_would_do_is_refused_and_what_webuiapi_sends_is_not() -> None:
    usual = {"show_extras_results": True, "gfpgan_visibility": 0, "codeformer_visibility": 0, "codeformer_weight": 0}
    usual |= {"upscaler_2": "None", "extras_upscaler_2_visibility": 0, "upscale_first": False}
    body = Upscaling(image="", **usual)
    refuse_unsupported(body)
    assert unknown_fields(body) == []
    for name, more in (
        ("gfpgan_visibility", {"gfpgan_visibility": 0.5}),
        ("codeformer_visibility", {"codeformer_visibility": 1}),
        ("upscaler_2", {"upscaler_2": "Lanczos", "extras_upscaler_2_visibility": 0.5}),
    ):
        with pytest.raises(FastsdError, match="not supported") as refused:
            refuse_unsupported(Upscaling(image="", **usual | more))
        assert refused.value.argument == name
    assert unknown_fields(Upscaling(image="", sharpen=1)) == ["fields that are not known and have no effect: sharpen"]
