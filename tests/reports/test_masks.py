"""What people reported of masks: strokes that paint nothing, greys that are cut, pixels that change though kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastsd import Control
from fastsd.config import ControlNetConfig
from fastsd.generate.masks import free_latents, scale_mask
from fastsd.image.infotext import parse_parameters, write_parameters
from fastsd.model.controlnet import ControlNet
from fastsd.pipeline import Pipeline, Result
from tests.support.pipelines import PHOTO, tiny_pipeline

CHANNELS = (4, 9)
SETTINGS: dict[str, Any] = {"image": PHOTO, "seed": 1, "num_inference_steps": 2, "strength": 1.0}


@pytest.fixture(scope="module", params=CHANNELS)
def pipe(request: pytest.FixtureRequest) -> Pipeline:
    return tiny_pipeline(in_channels=request.param)


def stroke(offset: int, width: int, side: int = 64) -> Image.Image:
    area = np.zeros((side, side), dtype=np.uint8)
    area[:, offset : offset + width] = 255
    return Image.fromarray(area)


def changed(result: Result, image: Image.Image = PHOTO) -> np.ndarray:
    """Which pixels differ from the image, `[H, W]`."""
    return (np.asarray(result.images[0]) != np.asarray(image)).any(-1)


@pytest.mark.parametrize("width", [1, 2, 3, 8, 16])
def test_thin_strokes_are_painted_in_full(pipe: Pipeline, width: int) -> None:
    """White is painted anew: nearly every pixel of noise under it is another, and no other pixel is."""
    for offset in (0, 5, 7, 8, 31, 64 - width):
        mask = stroke(offset, width)
        found = changed(pipe("a cat", mask_image=mask, **SETTINGS))
        white = np.asarray(mask) > 0
        assert found[white].mean() > 0.95 and not found[~white].any()


@pytest.mark.parametrize("size", [(64, 64), (63, 61), (17, 9), (128, 96), (1000, 333), (8, 8)])
def test_a_mask_of_another_size_loses_no_stroke(size: tuple[int, int]) -> None:
    """Each pixel of the scaled mask is the largest that it covers, so each stroke of 1 to 16 pixels is white there."""
    wide, high = 200, 150
    for width in range(1, 17):
        for offset in range(0, wide - width, 7):
            mask = np.zeros((high, wide), dtype=np.uint8)
            mask[:, offset : offset + width] = 255
            scaled = scale_mask(mask, size)
            assert scaled.shape == size[::-1]
            first, last = offset * size[0] // wide, -(-(offset + width) * size[0] // wide)
            assert (scaled[:, first:last] == 255).all() and not scaled[:, :first].any() and not scaled[:, last:].any()


def test_a_thin_stroke_of_a_large_mask_paints(pipe: Pipeline) -> None:
    result = pipe("a cat", mask_image=stroke(777, 1, 1024), **SETTINGS)
    found = changed(result)
    assert found[:, 48].mean() > 0.95 and not found[:, :48].any() and not found[:, 49:].any()
    assert "the mask was resized from 1024x1024 to 64x64" in result.notes


def test_a_grey_mask_blends_by_its_value(pipe: Pipeline) -> None:
    """Grey is not cut at 128: a value of v gives v of what is painted there and 1 - v of the image."""
    for value in (1, 100, 127, 128, 254):
        grey = Image.new("L", (64, 64), value)
        mask = Image.composite(grey, Image.new("L", (64, 64)), stroke(16, 24))
        moved = np.abs(np.asarray(pipe("a cat", mask_image=mask, **SETTINGS).images[0], float) - np.asarray(PHOTO))
        assert not moved[:, :16].any() and not moved[:, 40:].any()
        assert moved[:, 16:40].max() <= value  # v of a difference of at most 255
        if value > 50:
            assert (moved[:, 16:40] > 0).mean() > 0.5


def test_a_grey_latent_is_free_after_its_share_of_the_steps() -> None:
    """Differential diffusion (Levin and Fried 2023, algorithm 1): kept until the share 1 - v of the steps is done."""
    import torch

    from fastsd.config import SchedulerConfig
    from fastsd.sampling.build import build

    table = build("euler", 4, SchedulerConfig())
    values = torch.tensor([0.0, 0.1, 0.25, 0.5, 0.75, 1.0])[None, None, :, None]
    found = [free_latents(values, table, row).flatten().tolist() for row in range(4)]
    assert found == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]]


def test_a_mask_that_paints_nothing_is_said(pipe: Pipeline) -> None:
    white, black = Image.new("L", (64, 64), 255), Image.new("L", (64, 64))
    for mask, more in ((black, {}), (white, {"mask_invert": True})):
        result = pipe("a cat", mask_image=mask, **SETTINGS, **more)
        assert any("the mask is black all over" in note for note in result.notes) and not changed(result).any()
    assert not any("black" in note for note in pipe("a cat", mask_image=white, **SETTINGS).notes)


def test_a_blur_that_takes_a_thin_stroke_away_is_said() -> None:
    """A stroke of one pixel keeps about 1 / (sigma sqrt(2 pi)); a wide area keeps half at its edges."""
    pipe, square = tiny_pipeline(), Image.new("L", (64, 64))
    square.paste(255, (10, 10, 50, 50))
    for mask, said in ((stroke(30, 1), True), (square, False)):
        notes = pipe("a cat", mask_image=mask, mask_blur=4, **SETTINGS).notes
        assert any("less than a quarter" in note for note in notes) == said


@pytest.mark.parametrize("strength", [0.0, 0.3])
def test_a_run_that_changes_nothing_gives_the_image_back(strength: float) -> None:
    """Less than one step: the pixels are the input's, not those of a trip through the autoencoder."""
    for pipe, mask in ((tiny_pipeline(), None), (tiny_pipeline(), stroke(8, 16)), (tiny_pipeline(9), stroke(8, 16))):
        for output_type in ("pil", "np"):
            settings = SETTINGS | {"strength": strength, "mask_image": mask, "output_type": output_type}
            result = pipe("a cat", **settings)
            pixels = np.asarray(result.images[0], np.float32) / (255.0 if output_type == "pil" else 1.0)
            np.testing.assert_array_equal(pixels, np.asarray(PHOTO, np.float32) / 255.0)
            assert any("changes nothing" in note for note in result.notes) == (strength > 0)


OPTIONS: dict[str, dict[str, Any]] = {
    "blur": {"mask_blur": 3},
    "invert": {"mask_invert": True},
    "fill": {"inpaint_fill": "fill", "strength": 0.7},
    "noise": {"inpaint_fill": "noise", "strength": 0.7},
    "blank": {"inpaint_fill": "blank", "strength": 0.7},
    "only masked": {"inpaint_only_masked": True, "inpaint_padding": 3},
    "only masked, larger": {"inpaint_only_masked": True, "width": 128, "height": 96, "mask_blur": 2},
    "tiling": {"vae_tiling": True},
    "outpaint": {"outpaint": "8,0,0,16"},
    "outpaint only masked": {"outpaint": (0, 0, 24, 0), "inpaint_only_masked": True, "inpaint_fill": "noise"},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("channels", CHANNELS)
def test_what_the_mask_keeps_is_kept_exactly(name: str, channels: int) -> None:
    """In every option, and with a mask of greys: black is kept bit for bit, white is another pixel."""
    pipe, options = tiny_pipeline(in_channels=channels), OPTIONS[name]
    area = np.zeros((64, 64), dtype=np.uint8)
    area[20:44, 10:50] = 255
    area[30:34, 0:10] = 90
    result = pipe("a cat", mask_image=Image.fromarray(area), **SETTINGS | options)
    left, top, right, bottom = (int(n) for n in str(result.parameters.get("outpaint") or "0,0,0,0").split(","))
    found = np.asarray(result.images[0])
    assert found.shape == (64 + top + bottom, 64 + left + right, 3)
    inside = (found[top : top + 64, left : left + 64] != np.asarray(PHOTO)).any(-1)
    black = area == 0 if "mask_invert" not in options else area == 255
    if "mask_blur" in options:
        reach = int(2.5 * options["mask_blur"] + 0.5)
        rows, columns = np.nonzero(area)
        y, x = np.mgrid[:64, :64]
        black = np.ones((64, 64), dtype=bool)
        for row, column in zip(rows, columns, strict=True):
            black &= (abs(y - row) > reach) | (abs(x - column) > reach)
    assert black.any() and not inside[black].any()
    white = area == 255 if "mask_invert" not in options else area == 0
    assert inside[white].mean() > (0.7 if "mask_blur" in options else 0.9)


def test_an_area_painted_alone_is_in_its_place_at_the_border_and_in_thin_boxes() -> None:
    pipe = tiny_pipeline()
    image = Image.fromarray(np.random.RandomState(3).randint(0, 256, (150, 201, 3), dtype=np.uint8))
    boxes = ((0, 0, 3, 3), (198, 147, 3, 3), (0, 70, 201, 1), (100, 0, 1, 150), (0, 0, 201, 150), (90, 60, 12, 40))
    for left, top, wide, high in boxes:
        area = np.zeros((150, 201), dtype=np.uint8)
        area[top : top + high, left : left + wide] = 255
        for size in ({}, {"width": 128, "height": 64}):
            settings = SETTINGS | {"image": image, "inpaint_only_masked": True, "inpaint_padding": 8, **size}
            result = pipe("a cat", mask_image=Image.fromarray(area), **settings)
            found = changed(result, image)
            assert result.images[0].size == (201, 150) and not found[area == 0].any() and found[area > 0].mean() > 0.8


def test_control_images_are_cut_with_an_area_painted_alone() -> None:
    """A control image is one of the whole image: what lies outside the box does not matter, what is inside does."""
    pipe = tiny_pipeline()
    net = ControlNet(ControlNetConfig(pipe.components.unet.config, (8, 8, 8, 8))).eval().requires_grad_(False)
    for parameter in net.parameters():
        parameter.normal_(std=0.05)
    image = Image.fromarray(np.random.RandomState(3).randint(0, 256, (128, 192, 3), dtype=np.uint8))
    area = np.zeros((128, 192), dtype=np.uint8)
    area[100:116, 140:156] = 255

    def paint(hint: np.ndarray, output_type: str = "latent") -> Any:
        control = Control(net, Image.fromarray(hint).convert("RGB"))
        settings = SETTINGS | {"image": image, "inpaint_only_masked": True, "inpaint_padding": 4}
        settings |= {"controls": [control], "output_type": output_type}
        return pipe("a cat", mask_image=Image.fromarray(area), **settings)

    hint = np.zeros((128, 192), dtype=np.uint8)
    first, outside, inside = paint(hint), hint.copy(), hint.copy()
    outside[:90], inside[100:116, 140:156] = 255, 255
    assert not changed(paint(hint, "pil"), image)[area == 0].any()
    assert np.array_equal(first.images[0], paint(outside).images[0])
    assert not np.array_equal(first.images[0], paint(inside).images[0])


def test_outpainting_of_any_size_keeps_the_image() -> None:
    pipe = tiny_pipeline()
    image = PHOTO.crop((0, 0, 61, 50))
    for sides, size, at in (
        ("3,0,0,0", (64, 56), (3, 0)),
        ("0,0,10,30", (72, 80), (0, 0)),
        ("5,6,7,8", (80, 64), (5, 6)),
    ):
        result = pipe("a cat", outpaint=sides, **SETTINGS | {"image": image})
        found = np.asarray(result.images[0])
        assert result.images[0].size == size and any("multiples of 8" in n for n in result.notes) == (size != (64, 50))
        x, y = at
        np.testing.assert_array_equal(found[y : y + 50, x : x + 61], np.asarray(image))


def test_settings_of_a_mask_are_read_and_written_in_a1111s_words() -> None:
    """`StableDiffusionProcessingImg2Img.init` in A1111's modules/processing.py writes these pairs."""
    line = (
        "a cat\nSteps: 20, Sampler: Euler, Seed: 1, Size: 512x512, Denoising strength: 0.75, Mask mode: Inpaint not "
        "masked, Mask blur: 4, Inpaint area: Only masked, Masked area padding: 48, Masked content: latent noise"
    )
    found, others = parse_parameters(line)
    wanted = {
        "mask_invert": True,
        "mask_blur": 4.0,
        "inpaint_only_masked": True,
        "inpaint_padding": 48,
        "inpaint_fill": "noise",
    }
    assert {name: found[name] for name in wanted} == wanted and not others
    written = parse_parameters(write_parameters(found | {"outpaint": "8,0,8,0", "version": "1"}))[0]
    assert {name: written[name] for name in (*wanted, "outpaint")} == wanted | {"outpaint": "8,0,8,0"}
