"""The convolution kernels against float64."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsd.kernels.launch.conv2d import TABLE, ConvBoxes, ConvPointers, box_of, choose
from fastsd.kernels.triton import conv2d as module
from fastsd.kernels.triton import conv2d_pointers as pointers
from fastsd.kernels.triton import conv2d_tiles as tiles
from fastsd.kernels.triton import conv2d_tma as tma
from fastsd.kernels.triton import upsample2x_conv as doubled
from tests.support.triton_checks import DEVICE, broken_with_importers, check, must_fail, rand

SAME = (1, 1, 1, 1)
# Tiles of 32 pixels, so that small maps have several.
BOXES = ConvBoxes((1, 4, 8), (32, 16), 16, 4, 2)
SWAPPED = ConvBoxes((1, 4, 8), (64, 0), 16, 4, 2, swapped=True)
IMAGES = ConvBoxes((2, 4, 4), (16, 0), 32, 4, 2)
POINTERS = ConvPointers(32, 32, 16, 4, 2)
DTYPES = [dtype for dtype in (torch.float16, torch.bfloat16) if dtype in module.DTYPES]


class Case(NamedTuple):
    batch: int
    height: int
    width: int
    inputs: int
    outputs: int
    launch: ConvBoxes | ConvPointers | None = None
    stride: int = 1
    padding: tuple[int, int, int, int] = SAME
    kernel: int = 3
    residual: bool = True
    activation: str = "none"


CASES = {
    "boxes, no size a multiple of the tile's": Case(2, 5, 11, 24, 40, BOXES),
    "boxes, whole tiles": Case(1, 8, 8, 32, 48, BOXES, activation="silu"),
    "boxes, channels of a second part alone": Case(1, 4, 8, 16, 56, BOXES, residual=False),
    "boxes, weights first": Case(1, 5, 9, 24, 72, SWAPPED, activation="relu"),
    "boxes of two images, the last one alone": Case(3, 3, 4, 40, 24, IMAGES),
    "boxes, one pixel": Case(2, 1, 1, 8, 8, IMAGES),
    "boxes, split": Case(2, 5, 7, 24, 24, replace(BOXES, split=3), activation="relu"),
    "boxes, split into single steps": Case(1, 3, 3, 16, 16, replace(IMAGES, depth=16, split=9), residual=False),
    "boxes, 1 x 1": Case(1, 4, 5, 24, 16, BOXES, padding=(0, 0, 0, 0), kernel=1),
    "boxes, uneven padding": Case(1, 4, 6, 8, 8, BOXES, padding=(0, 2, 2, 1)),
    "addresses, no size a multiple of the tile's": Case(2, 5, 11, 24, 40, POINTERS),
    "addresses, stride 2": Case(2, 9, 7, 24, 40, POINTERS, stride=2),
    "addresses, stride 2 as in the VAE": Case(1, 8, 9, 16, 32, POINTERS, 2, (0, 1, 0, 1), activation="silu"),
    "addresses, the UNet's first channels": Case(2, 4, 5, 4, 32, POINTERS),
    "addresses, inpainting's first channels": Case(1, 4, 5, 9, 24, POINTERS, residual=False),
    "addresses, an image's channels": Case(1, 5, 5, 16, 3, POINTERS, residual=False),
    "addresses, one pixel": Case(2, 1, 1, 8, 8, POINTERS),
    "addresses, split": Case(2, 5, 7, 24, 24, replace(POINTERS, split=4), activation="silu"),
    "the committed launch": Case(1, 6, 5, 16, 24),
    "the committed launch of 3 to 4 channels": Case(1, 6, 5, 3, 4),
}


def plain(case: Case, x, w, b, r):
    y = F.conv2d(F.pad(x.permute(0, 3, 1, 2), case.padding), w, b, case.stride).permute(0, 2, 3, 1)
    y = y if r is None else y + r
    return {"none": lambda y: y, "relu": F.relu, "silu": F.silu}[case.activation](y)


def run(case: Case, dtype: torch.dtype, bias: bool = True, layout: str = "contiguous", kernels: Any = module):
    """Check one case. The kernels' map is contiguous: the layout "gaps" is refused."""
    x = rand(case.batch, case.height, case.width, case.inputs, dtype=dtype)
    # As stored: channels last.
    w = rand(case.outputs, case.kernel, case.kernel, case.inputs, dtype=dtype, scale=x[0, 0, 0].numel() ** -0.5 / 3)
    b = rand(case.outputs, dtype=dtype, seed=1) if bias else None
    shape = plain(case, x, w.permute(0, 3, 1, 2), b, None).shape
    check(
        lambda x, w, b, r: kernels.conv2d(
            x, w.permute(0, 3, 1, 2), b, case.stride, case.padding, r, case.activation, case.launch
        ),
        lambda x, w, b, r: plain(case, x, w.permute(0, 3, 1, 2), b, r),
        *(x, w, b),
        rand(*shape, dtype=dtype, seed=2) if case.residual else None,
        layout=layout,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reason", CASES)
def test_conv2d(reason, dtype):
    run(CASES[reason], dtype)


def test_conv2d_of_a_map_that_the_copy_engine_cannot_read():
    """It begins two bytes after a multiple of 16; the table says boxes, and addresses are used."""
    case = CASES["the committed launch"]
    assert isinstance(choose(90, case.height, case.width, case.inputs, case.outputs, 9, 1, 1), ConvBoxes)
    run(case, torch.float16, bias=False, layout="offset")


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_conv2d_at_any_shape(data):
    height, width, batch = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9)), data.draw(st.integers(1, 3))
    by_boxes = data.draw(st.booleans())
    inputs = 8 * data.draw(st.integers(1, 4)) if by_boxes else data.draw(st.integers(1, 20))
    outputs, kernel = data.draw(st.integers(1, 40)), data.draw(st.sampled_from([1, 2, 3]))
    split, depth = data.draw(st.integers(1, kernel**2)), data.draw(st.sampled_from([16, 32]))
    if by_boxes:
        box = data.draw(st.sampled_from([(1, 4, 4), (1, 2, 8), (2, 2, 4), (4, 4, 1)]))
        channels = data.draw(st.sampled_from([(16, 0), (32, 16)]))
        launch = ConvBoxes(box, channels, depth, 4, 2, split, data.draw(st.booleans()))
    else:
        launch = ConvPointers(16, 16, depth, 4, 2, split)
    stride = 1 if by_boxes else data.draw(st.integers(1, 2))
    padding = tuple(data.draw(st.integers(kernel - 1, 2)) for _ in range(4))
    activation = data.draw(st.sampled_from(["none", "relu", "silu"]))
    case = Case(batch, height, width, inputs, outputs, launch, stride, padding, kernel, data.draw(st.booleans()),
                activation)  # fmt: skip
    run(case, torch.float16, data.draw(st.booleans()))


UPSAMPLING = {
    "boxes": Case(2, 3, 5, 24, 40, BOXES),
    "boxes, split": Case(1, 3, 5, 24, 24, replace(BOXES, split=2)),
    "boxes of two images": Case(3, 3, 2, 16, 16, IMAGES),
    "addresses": Case(2, 3, 5, 12, 40, POINTERS),
    "addresses, split": Case(1, 3, 5, 12, 24, replace(POINTERS, split=2)),
    "more channels than a program sums": Case(1, 1, 2, 520, 3, ConvBoxes((1, 1, 16), (16, 0), 128, 4, 2)),
    "the committed launch": Case(1, 3, 4, 16, 24),
}


def run_upsampling(case: Case, dtype: torch.dtype, bias: bool = True, kernels: Any = doubled):
    """Rounding the sums of taps to u = eps / 2 moves a result of deviation s by u s / sqrt(3); one ulp of the largest
    result, which the rule allows, is at least 2 u s."""
    x = rand(case.batch, case.height, case.width, case.inputs, dtype=dtype)
    w = rand(case.outputs, 3, 3, case.inputs, dtype=dtype, scale=(9 * case.inputs) ** -0.5)  # as stored: channels last

    def plain(x, w, b):
        up = x.repeat_interleave(2, 1).repeat_interleave(2, 2).permute(0, 3, 1, 2)
        return F.conv2d(up, w.permute(0, 3, 1, 2), b, padding=1).permute(0, 2, 3, 1)

    check(
        lambda x, w, b: kernels.upsample2x_conv(x, w.permute(0, 3, 1, 2), b, case.launch),
        plain,
        *(x, w, rand(case.outputs, dtype=dtype, seed=1) if bias else None),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reason", UPSAMPLING)
def test_upsample2x_conv(reason, dtype):
    run_upsampling(UPSAMPLING[reason], dtype)


@pytest.mark.parametrize("launch", [None, BOXES, IMAGES, POINTERS, replace(BOXES, split=2)])
def test_conv2d_does_not_depend_on_the_batch(launch):
    x, w = rand(3, 4, 5, 16, dtype=torch.float16).to(DEVICE), rand(24, 16, 3, 3, dtype=torch.float16).to(DEVICE)
    w = w.contiguous(memory_format=torch.channels_last)
    whole = module.conv2d(x, w, padding=SAME, launch=launch)
    for i in range(3):
        assert torch.equal(whole[i : i + 1], module.conv2d(x[i : i + 1], w, padding=SAME, launch=launch))


@pytest.mark.parametrize("launch", [BOXES, POINTERS])
def test_conv2d_keeps_a_nan_among_its_neighbours(launch):
    x, w = rand(1, 6, 6, 8, dtype=torch.float16).to(DEVICE), rand(8, 8, 3, 3, dtype=torch.float16).to(DEVICE)
    x[0, 2, 3, 5] = float("nan")
    w = w.contiguous(memory_format=torch.channels_last)
    y = module.conv2d(x, w, padding=SAME, activation="relu", launch=launch).isnan()
    expected = torch.zeros(6, 6, dtype=torch.bool, device=DEVICE)
    expected[1:4, 2:5] = True
    assert torch.equal(y[0], expected[..., None].expand(6, 6, 8))


# fmt: off
MUTATIONS: dict[str, tuple[Any, str, str]] = {
    "writes past the channels": (tiles, "& (column < N)[None, :]", "& (column <= N)[None, :]"),
    "omits the bias": (tiles, "acc += tl.load(bias_ptr", "acc += 0 * tl.load(bias_ptr"),
    "adds the bias of the first channels": (tiles, "bias_ptr + column", "bias_ptr + column % 16"),
    "omits the residual": (tiles, "acc += tl.load(residual_ptr", "acc += 0 * tl.load(residual_ptr"),
    "adds the first tile's residual": (tiles, "residual_ptr + origin * N", "residual_ptr"),
    "writes the first tile only": (tiles, "out_ptr += origin * N", "out_ptr += 0 * N"),
    "sums all parts but one": (tiles, "tl.static_range(SPLITS)", "tl.static_range(SPLITS - 1)"),
    "sums one part again and again": (tiles, "parts_ptr += tl.cast(size, tl.int64)", "parts_ptr += 0"),
    "adds the bias by its place in a block": (tiles, "((start % N).to(tl.int32) + lane)", "lane"),
    "writes past the sums": (tiles, "live = start + lane < size", "live = start + lane < size + 1"),
    "applies no activation": (tiles, 'ACTIVATION == "relu"', 'ACTIVATION == "none"'),
    "applies SiLU's slope": (tiles, "y / (1.0 + tl.exp(-y))", "1.0 / (1.0 + tl.exp(-y))"),
    "swaps back to front": (tiles, "acc = tl.trans(acc)", "acc = tl.trans(acc)[:, :]  * 0.5"),
    "takes rows for columns": (tma, "row + tap // KW, column + tap % KW", "row + tap % KW, column + tap // KW"),
    "pads no row": (tma, "y0 - top", "y0"),
    "pads no column": (tma, "x0 - left", "x0"),
    "repeats the first channels": (tma, "k // TAPS * BK", "0"),
    "takes the next tap's weights": (tma, "tap * C + c]), acc1", "(tap + 1) % TAPS * C + c]), acc1"),
    "takes the first part's weights twice": (tma, "phase * N + n0 + N1", "phase * N + n0"),
    "takes the first phase's weights": (tma, "[phase * N + n0, ", "[n0, "),
    "shifts no phase's rows": (tma, "y0 - top + odd_row", "y0 - top"),
    "writes phases next to each other": (tma, "+ y0 * UP + odd_row", "+ y0 * UP"),
    "writes past the rows": (tma, "(y0 + y < OH)", "(y0 + y < OH + 1)"),
    "writes past the columns": (tma, "(x0 + x < OW)", "(x0 + x <= OW)"),
    "writes past the images": (tma, "(b0 + b < B)", "(b0 + b <= B)"),
    "computes a step twice": (tma, "+ 1) * STEPS // SPLITS", "+ 1) * STEPS // SPLITS + 1"),
    "writes all parts to one place": (tma, "tl.cast(split, tl.int64) * B", "0 * B"),
    "sums the taps of even rows for odd ones": (doubled, "(dy + 1 - odd_row) // 2", "(dy + 1) // 2"),
    "sums the taps of odd columns for even ones": (doubled, "(dx + 1 - odd_column) // 2", "dx // 2"),
    "sums the first channels only": (doubled, "tl.program_id(1) * BLOCK_C", "0 * BLOCK_C"),
    "writes past a tap": (doubled, "element_ty), mask=c < C", "element_ty), mask=c < C + 1"),
    "sums one tap": (doubled, "total += ", "total = "),
    "pads no row, by address": (pointers, "y * STRIDE - top", "y * STRIDE"),
    "ignores the stride": (pointers, "x * STRIDE - left", "x - left"),
    "reads above the map": (pointers, "(row + dy >= 0) & ", ""),
    "reads below the map": (pointers, "(row + dy < H)", "(row + dy <= H)"),
    "reads left of the map": (pointers, "(column + dx >= 0) & ", ""),
    "reads right of the map": (pointers, "(column + dx < W)", "(column + dx <= W)"),
    "reads past the channels": (pointers, "x_mask & (channel + c < C)[None, :]", "x_mask"),
    "multiplies past the channels": (pointers, "w_mask & (channel + c < C)[None, :]", "w_mask"),
    "takes the next tap's weights, by address": (pointers, "(tap * C + channel)", "((tap + 1) % TAPS * C + channel)"),
    "takes the first channels' weights": (pointers, "(phase * N + n0)", "(phase * N)"),
    "takes the first phase's weights, by address": (pointers, "(phase * N + n0)", "(n0)"),
    "forgets where it is near": (pointers, "* W + column - near", "* W + column"),
    "writes phases next to each other, by address": (pointers, "x * UP + odd_column", "x * UP"),
    "computes a step twice, by address": (pointers, "+ 1) * STEPS // SPLITS", "+ 1) * STEPS // SPLITS + 1"),
    "writes all parts to one place, by address": (pointers, "split.to(tl.int64) * B", "0 * B"),
}
# fmt: on


@pytest.mark.parametrize("fault", MUTATIONS)
def test_the_checks_notice_when_conv2d(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    where, old, new = MUTATIONS[fault]
    importers = {tiles: [tma, pointers, module], tma: [module], pointers: [module], doubled: []}[where]
    importers += [doubled] if where is not doubled else []
    upsampling = broken_with_importers(where, old, new, importers, tmp_path, monkeypatch)
    copy = sys.modules[module.__name__]
    with must_fail():
        if where is doubled:
            run_upsampling(UPSAMPLING["more channels than a program sums"], torch.float16, kernels=upsampling)
            return
        if where is not pointers:
            run(CASES["boxes, weights first"], torch.float16, kernels=copy)
            run(CASES["boxes, no size a multiple of the tile's"], torch.float16, kernels=copy)
            run(CASES["boxes of two images, the last one alone"], torch.float16, kernels=copy)
            run(CASES["boxes, split"], torch.float16, kernels=copy)
            run_upsampling(UPSAMPLING["boxes"], torch.float16, kernels=upsampling)
        if where is not tma:
            run(CASES["addresses, stride 2 as in the VAE"], torch.float16, kernels=copy)
            run(CASES["addresses, no size a multiple of the tile's"], torch.float16, kernels=copy)
            run(CASES["addresses, split"], torch.float16, kernels=copy)
            run_upsampling(UPSAMPLING["addresses"], torch.float16, kernels=upsampling)


ONES = torch.ones(1, 4, 4, 8, dtype=torch.float16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": ONES.float()}, "x is float32"),
        ({"bias": torch.ones(8)}, "bias is float32"),
        ({"activation": "gelu"}, "must be none, relu, silu"),
        ({"x": ONES[..., :4]}, r"\[N, C, kh, kw\]"),
        ({"padding": (0, 0, -2, 0)}, "needs a pixel"),
        ({"bias": torch.ones(4).half()}, r"it needs \[8\]"),
        ({"residual": ONES}, r"shape of the result, \[1, 2, 2, 8\]"),
        ({"x": ONES.expand(2, 4, 4, 8)}, "needs it contiguous"),
        ({"weight": torch.ones(8, 8, 3, 3).half()}, "channels-last"),
        ({"bias": torch.ones(8).half().requires_grad_(True)}, "no gradients"),
    ],
)
def test_conv2d_refuses(changes: dict[str, Any], message: str):
    weight = torch.ones(8, 3, 3, 8).half().permute(0, 3, 1, 2)
    with pytest.raises(ValueError, match=message):
        module.conv2d(**({"x": ONES, "weight": weight} | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": ONES.permute(0, 3, 1, 2)}, r"it needs \[N, C, 3, 3\]"),
        ({"bias": torch.ones(4).half()}, r"upsample2x_conv: bias is \[4\]"),
    ],
)
def test_upsample2x_conv_refuses(changes: dict[str, Any], message: str):
    weight = torch.ones(8, 3, 3, 8).half().permute(0, 3, 1, 2)
    with pytest.raises(ValueError, match=message):
        doubled.upsample2x_conv(**({"x": ONES, "weight": weight} | changes))


def test_sm_75_is_refused_by_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module.architecture, "class_of", lambda device: 75)
    assert "sm_75" in str(module.refusal(ONES, ONES.permute(0, 3, 1, 2)))


@pytest.mark.parametrize("key", TABLE)
def test_launches_of_conv2d_fit(key: int):
    """Tiles cover a result with powers of two, and shared memory holds what a launch keeps in flight."""
    from bench.compiled import SHARED

    shapes = [(side, side, c, n) for side in (8, 15, 64, 128) for c in (4, 9, 320, 960, 2560) for n in (4, 320, 1280)]
    for height, width, inputs, outputs in [*shapes, (1024, 1024, 128, 3), (1, 1, 8, 8), (104, 152, 320, 320)]:
        for stride, phases in ((1, 1), (2, 1), (1, 4)):
            launch = choose(key, height, width, inputs, outputs, 9 if phases == 1 else 4, stride, phases)
            channels = launch.channels if isinstance(launch, ConvBoxes) else (launch.channels, 0)
            pixels = math.prod(launch.box) if isinstance(launch, ConvBoxes) else launch.pixels
            for size in (pixels, channels[0], channels[1] or 1, launch.depth):
                assert size & (size - 1) == 0
            assert min(channels[0], launch.depth) >= 16 and pixels in (128, 256)
            assert 2 * launch.depth * (pixels + sum(channels)) * launch.stages <= SHARED[key]
            assert 1 <= launch.split <= 9 * -(-inputs // launch.depth)


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [(64, 64, (1, 8, 16)), (8, 8, (2, 8, 8)), (1, 1, (128, 1, 1)), (104, 152, (1, 8, 16)), (1, 300, (1, 1, 128))],
)
def test_a_box_wastes_as_few_pixels_as_possible(height: int, width: int, box: tuple[int, int, int]):
    found = box_of(height, width, 128)
    assert math.prod(found) == 128

    def computed(box: tuple[int, int, int]) -> float:
        return -(-height // box[1]) * -(-width // box[2]) * 128 / box[0]

    assert computed(found) <= computed(box)
