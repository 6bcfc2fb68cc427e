"""The kernels of `conv2d_fp8`: the specification's numbers, and its convolution to one rounding."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from fastsd.kernels import conv2d_fp8 as specification
from fastsd.kernels.launch.conv2d import TABLE, ConvBoxes, ConvPointers, choose
from fastsd.kernels.triton import conv2d as conv2d_module
from fastsd.kernels.triton import conv2d_fp8 as module
from fastsd.kernels.triton import conv2d_pointers as pointers
from fastsd.kernels.triton import conv2d_tiles as tiles
from fastsd.kernels.triton import conv2d_tma as tma
from fastsd.kernels.triton import linear_fp8 as rows
from fastsd.kernels.triton import linear_tiles
from tests.support.triton_checks import DEVICE, Guards, broken_with_importers, check, must_fail, rand

if DEVICE == "cuda" and torch.cuda.get_device_capability() < rows.OLDEST_GPU:
    pytest.skip("this GPU does not multiply fp8", allow_module_level=True)

FP16 = torch.float16
SAME = (1, 1, 1, 1)
# Tiles of 32 pixels, so that small maps have several.
BOXES = ConvBoxes((1, 4, 8), (32, 16), 32, 4, 2)
SWAPPED = ConvBoxes((1, 4, 8), (64, 0), 32, 4, 2, swapped=True)
IMAGES = ConvBoxes((2, 4, 4), (16, 0), 64, 4, 2)
POINTERS = ConvPointers(32, 32, 32, 4, 2)


class Case(NamedTuple):
    batch: int
    height: int
    width: int
    inputs: int
    outputs: int
    launch: ConvBoxes | ConvPointers | None = None
    stride: int = 1
    padding: tuple[int, int, int, int] = SAME
    residual: bool = True


CASES = {
    "boxes, no size a multiple of the tile's": Case(2, 5, 11, 48, 40, BOXES),
    "boxes, whole tiles": Case(1, 8, 8, 32, 48, BOXES),
    "boxes, weights first": Case(2, 5, 9, 48, 72, SWAPPED),
    "boxes of two images, the last one alone": Case(3, 3, 4, 48, 24, IMAGES, residual=False),
    "boxes, split": Case(2, 5, 7, 16, 24, replace(BOXES, split=3)),
    "addresses, no size a multiple of the tile's": Case(2, 5, 11, 48, 40, POINTERS),
    "addresses, stride 2": Case(2, 9, 7, 16, 40, POINTERS, 2, (0, 1, 0, 1)),
    "addresses, split": Case(2, 5, 7, 16, 24, replace(POINTERS, split=4), residual=False),
    "the committed launch": Case(2, 6, 5, 16, 24),
    "the committed launch, stride 2": Case(1, 6, 5, 80, 24, stride=2),
}
if DEVICE == "cuda" and torch.cuda.get_device_capability() < (9, 0):
    CASES = {reason: case for reason, case in CASES.items() if not isinstance(case.launch, ConvBoxes)}


def run(case: Case, kernels: Any = module) -> None:
    """Images are of eight times the size of the last one, so that each has a scale of its own."""
    x = torch.stack([rand(*case[1:4], dtype=FP16, seed=i) * 8**i for i in range(case.batch)])
    w = rand(case.outputs, 3, 3, case.inputs, dtype=FP16, scale=(9 * case.inputs) ** -0.5)
    w = w * torch.logspace(-2, 2, case.outputs, 2, dtype=FP16)[:, None, None, None]  # so has each channel

    def plain(x, w, bias, residual):
        values, scale = specification.quantize_maps(w)
        arguments = values.permute(0, 3, 1, 2), scale, bias, case.stride, case.padding, residual
        return specification.conv2d_fp8_ref(x, *arguments)

    def kernel(x, w, bias, residual):
        values, scale = specification.quantize_maps(w)
        arguments = values.permute(0, 3, 1, 2), scale, bias, case.stride, case.padding, residual
        return kernels.conv2d_fp8(x, *arguments, case.launch)

    bias = rand(case.outputs, dtype=FP16, seed=1)
    shape = plain(x, w, None, None).shape
    check(kernel, plain, x, w, bias, rand(*shape, dtype=FP16, seed=2) if case.residual else None)


@pytest.mark.parametrize("reason", CASES)
def test_conv2d_fp8(reason: str):
    run(CASES[reason])


def check_quantised(x: torch.Tensor, kernels: Any = module) -> None:
    guards = Guards()
    placed = guards.place(x)
    with guards:
        values, scales = kernels.quantize_maps(placed)
    guards.intact()
    wanted, wanted_scales = specification.quantize_maps(x)
    assert torch.equal(scales.cpu(), wanted_scales)
    assert torch.equal(values.cpu().float(), wanted.float())


@pytest.mark.parametrize("most", [2, 256])  # parts, of several blocks or of one
@pytest.mark.parametrize("scale", [1e-6, 1.0, 500.0])
def test_maps_are_quantised_to_the_numbers_of_the_specification(scale: float, most: int, monkeypatch: Any):
    monkeypatch.setattr(module, "MOST", most)
    x = rand(3, 17, 19, 48, dtype=FP16, scale=scale).clamp(-60000, 60000)  # 15504 elements: in four blocks
    x[1], x[2, 16, 18, 47] = 0, 2 * x[2].abs().max()  # the largest is the last of all
    check_quantised(x)


def test_what_is_no_number_counts_as_infinity():
    """The interpreter makes a number of it when it converts to e4m3; a GPU does not."""
    x = rand(3, 2, 3, 16, dtype=FP16)
    x[0, 1, 1, 3], x[1, 0, 2, 15] = float("nan"), float("-inf")
    values, scales = (y.cpu() for y in module.quantize_maps(x.to(DEVICE)))
    wanted, wanted_scales = specification.quantize_maps(x)
    assert torch.equal(scales, wanted_scales) and scales[0] == scales[1] > 1e30
    assert torch.equal(values.float()[~x.isnan()], wanted.float()[~x.isnan()]) and values[1, 0, 2, 15].float() == -448


def test_an_image_does_not_depend_on_its_batch():
    x = torch.stack([rand(4, 5, 32, dtype=FP16, seed=i) * 8**i for i in range(3)]).to(DEVICE)
    values, scale = specification.quantize_maps(rand(24, 3, 3, 32, dtype=FP16, scale=0.1).to(DEVICE))
    weight = values.permute(0, 3, 1, 2)
    whole = module.conv2d_fp8(x, weight, scale, padding=SAME)
    for i in range(3):
        assert torch.equal(whole[i : i + 1], module.conv2d_fp8(x[i : i + 1], weight, scale, padding=SAME))


MUTATIONS: dict[str, tuple[Any, str, str]] = {
    "forgets the scales of maps": (tiles, "scale_w_ptr, image, column", "scale_w_ptr, 0 * image, column"),
    "forgets the scales of channels": (tiles, "scale_w_ptr, image, column", "scale_w_ptr, image, 0 * column"),
    "takes the map's place in a box": (tma, "live, b0 + b,", "live, b,"),
    "takes the first map's scale": (pointers, "pixel, live, b, n,", "pixel, live, 0 * b, n,"),
    "scales columns as rows": (
        linear_tiles,
        "mask=within, other=0.0)[None, :]",
        "mask=within, other=0.0)[None, :] * 2",
    ),
    "takes a scale that is too small": (rows, ">> 23) - 8", ">> 23) - 9"),
    "writes all scales to one place": (module, "tl.store(scale_ptr + image", "tl.store(scale_ptr + 0 * image"),
    "forgets the last part": (module, "mask=number < parts", "mask=number < parts - 1"),
    "reduces the first map's parts": (module, "largest_ptr + image * parts", "largest_ptr"),
    "forgets the sign": (module, "tl.abs(x.to(tl.float32))", "x.to(tl.float32)"),
    "reads the first map": (module, "x_ptr += image * size + first", "x_ptr += first"),
    "writes the first map": (module, "out_ptr += image * size + first", "out_ptr += first"),
    "reads the first part": (module, "x_ptr += image * size + first", "x_ptr += image * size"),
    "writes past a map": (module, "within = first + k + lane < size", "within = first + k + lane < size + 16"),
}


@pytest.mark.parametrize("fault", MUTATIONS)
def test_the_checks_notice_when_conv2d_fp8(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    broken, *change = MUTATIONS[fault]
    chain = [linear_tiles, rows, tiles, tma, pointers, conv2d_module, module]
    kernels = broken_with_importers(broken, *change, chain[chain.index(broken) + 1 :], tmp_path, monkeypatch)
    assert kernels is sys.modules[module.__name__]
    with must_fail():
        if broken is module:  # negative numbers are the largest, in the last part of the last map
            x = rand(2, 9, 10, 48, dtype=FP16)
            x[1, 8, 9, 47] = -20.0
            check_quantised(x, kernels)
        run(CASES["boxes of two images, the last one alone"], kernels)
        run(CASES["addresses, no size a multiple of the tile's"], kernels)


def fp8(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, dtype=FP16).to(module.FP8).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.ones(1, 4, 4, 16)}, "16 bits"),
        ({"weight": torch.ones(8, 16, 3, 3, dtype=FP16)}, "weight is torch.float16; it needs torch.float8"),
        ({"weight": fp8(8, 3, 3, 32)}, r"\[N, C, kh, kw\]"),
        ({"scale": torch.ones(3)}, r"scale is \[3\]; it needs \[8\]"),
        ({"bias": torch.ones(8)}, "bias is torch.float32"),
        ({"residual": torch.ones(1, 4, 4, 8, dtype=FP16)}, "shape of the result"),
        ({"x": torch.ones(1, 4, 4, 8, dtype=FP16), "weight": fp8(8, 3, 3, 8)}, "channels in multiples of 16"),
        ({"x": torch.ones(0, 4, 4, 16, dtype=FP16)}, "channels in multiples of 16"),
    ],
)
def test_conv2d_fp8_refuses(changes: dict[str, Any], message: str):
    given = {"x": torch.ones(1, 4, 4, 16, dtype=FP16), "weight": fp8(8, 3, 3, 16), "scale": torch.ones(8)} | changes
    with pytest.raises(ValueError, match=message):
        module.conv2d_fp8(**given)


@pytest.mark.parametrize("key", [key for key in TABLE if key > 80])
@pytest.mark.parametrize("stride", [1, 2])
def test_launches_of_conv2d_fp8_fit(key: int, stride: int):
    """As in 16 bits, of which a step has the bytes or half of them."""
    from bench.compiled import SHARED

    for side, inputs, outputs in [
        (s, c, n) for s in (8, 15, 64, 128) for c in (64, 320, 960, 2560) for n in (64, 320, 1280)
    ]:
        launch = choose(key, side, side, inputs, outputs, 9, stride, 1, 1)
        channels = launch.channels if isinstance(launch, ConvBoxes) else (launch.channels, 0)
        pixels = launch.box[0] * launch.box[1] * launch.box[2] if isinstance(launch, ConvBoxes) else launch.pixels
        assert launch.depth >= 32 and 8 * (-inputs % launch.depth) <= inputs
        assert launch.depth * (pixels + sum(channels)) * launch.stages <= SHARED[key]
        assert 1 <= launch.split <= 9 * -(-inputs // launch.depth)
