"""The kernels of `linear` and `geglu` against float64.

Inputs are views of wider tensors whose other columns are NaN: a read of what is not theirs makes a result NaN. Only
what a discarded row or column reads is not noticed.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsd.kernels.launch import linear as launches
from fastsd.kernels.launch.linear import Gemm
from fastsd.kernels.linear import activate
from fastsd.kernels.triton import linear as module
from fastsd.kernels.triton import linear_tiles
from tests.support.triton_checks import DEVICE, broken_with_importers, check, must_fail, rand

DTYPES = module.DTYPES
GAP = 8  # NaN columns after each row
SMALL = Gemm(32, 32, 16, 32, 4, 2)
TILES = {
    "pointers": SMALL,
    "descriptors": replace(SMALL, tma=True),
    "one part": replace(SMALL, more=0),
    "split": replace(SMALL, splits=3),
    "split, descriptors": replace(SMALL, splits=2, tma=True),
}
if DEVICE == "cuda" and torch.cuda.get_device_capability() < (9, 0):
    TILES = {name: tile for name, tile in TILES.items() if not tile.tma}
SHAPES = {  # rows, columns, K
    "several tiles, the last ones short": (70, 106, 104),
    "less than a tile": (3, 8, 8),
    "one row, as the time embedding": (1, 64, 96),
    "whole tiles": (64, 96, 64),
    "more rows of tiles than are neighbours": (270, 24, 40),
    "an odd number of columns": (33, 37, 72),
}


def padded(*shape: int, dtype: torch.dtype, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    return F.pad(rand(*shape, dtype=dtype, scale=scale, seed=seed), (0, GAP), value=math.nan)


def view(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x[..., :-GAP]


def run(
    shape: tuple[int, ...],
    k: int,
    dtype: torch.dtype,
    launch: Gemm | None,
    activation: str = "none",
    bias: bool = True,
    residual: bool = False,
    skip: int = 0,
    kernels: Any = module,
) -> None:
    """shape: of the result; skip: columns of the skip input."""
    columns, like = shape[-1], {"dtype": dtype}
    x, w = padded(*shape[:-1], k, **like), padded(columns, k + skip, **like, scale=(k + skip) ** -0.5, seed=1)
    r = padded(*shape, **like, seed=2) if residual else None
    s = padded(*shape[:-1], skip, **like, seed=3) if skip else None
    b = rand(columns, **like, seed=4) if bias else None

    def kernel(x, w, b, r, s):
        return kernels.linear(view(x), view(w), b, activation, view(r), view(s), launch)

    def plain(x, w, b, r, s):
        whole = view(x) if s is None else torch.cat([view(x), view(s)], -1)
        y = activate(F.linear(whole, view(w), b), activation)
        return y if r is None else y + view(r)

    check(kernel, plain, x, w, b, r, s)


def run_geglu(
    shape: tuple[int, ...],
    k: int,
    dtype: torch.dtype,
    launch: Gemm | None,
    bias: bool = True,
    scale: float = 1.0,
    kernels: Any = module,
) -> None:
    """shape: of the result."""
    x, w = padded(*shape[:-1], k, dtype=dtype, scale=scale), padded(2 * shape[-1], k, dtype=dtype, scale=k**-0.5)
    b = rand(2 * shape[-1], dtype=dtype, scale=scale, seed=1)

    def plain(x, w, b):
        value, gate = F.linear(view(x), view(w), b).chunk(2, -1)
        return value * F.gelu(gate)

    check(lambda x, w, b: kernels.geglu(view(x), view(w), b, launch), plain, x, w, b if bias else None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("reason", SHAPES)
def test_linear(reason, tile, dtype):
    rows, columns, k = SHAPES[reason]
    run((rows, columns), k, dtype, TILES[tile], residual=True)
    run((1, rows, columns), k, dtype, TILES[tile], "silu", bias=False)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("activation", ["none", "silu", "gelu", "quick_gelu"])
def test_linear_with_what_follows(activation, tile):
    run((2, 9, 40), 72, torch.float16, TILES[tile], activation, residual=True)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("k", "skip"), [(72, 40), (64, 32), (8, 104)])
def test_linear_with_a_skip_input(k, skip, tile):
    """Parts that end inside an iteration, and at its end."""
    run((2, 9, 40), k, torch.float16, TILES[tile], residual=True, skip=skip)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("reason", SHAPES)
def test_geglu(reason, tma, dtype):
    if tma and not any(tile.tma for tile in TILES.values()):
        pytest.skip("this GPU has no tensor descriptors")
    rows, columns, k = SHAPES[reason]
    launch = Gemm(32, 16, 16, 32, 4, 2, tma=tma)
    run_geglu((rows, columns), k, dtype, launch)
    run_geglu((1, rows, columns), k, dtype, launch, bias=False)
    run_geglu((rows, columns), k, dtype, launch, scale=50.0)  # large gates, where GELU is 0 or the gate


@pytest.mark.parametrize("skip", [0, 40])
def test_the_launches_of_the_tables(skip):
    run((130, 168), 136, torch.float16, None, residual=True, skip=skip)
    run_geglu((130, 136), 136, torch.float16, None)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    st.tuples(st.integers(1, 2), st.integers(1, 40), st.integers(1, 60)),
    st.integers(1, 9),
    st.sampled_from(sorted(TILES)),
    st.sampled_from(["none", "silu", "gelu", "quick_gelu"]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 5),
)
def test_linear_at_any_shape(shape, units, tile, activation, bias, residual, skip):
    run(shape, 8 * units, torch.float16, TILES[tile], activation, bias, residual, 8 * skip)


LINEAR = {
    "sums no rows of tiles but the first": ("first, column1 = tile_row * ROWS", "first, column1 = 0 * ROWS"),
    "takes the first part of the columns twice": (
        "column1 + (N if GATED else COLUMNS1)",
        "column1 + (N if GATED else 0)",
    ),
    "reads the skip input's weights at the wrong place": ("0, K2, K1, M, W, K2", "0, K2, 0, M, W, K2"),
    "forgets what it does in units": ("K1, K2 = K1 * UNIT, K2 * UNIT", "K1, K2 = K1 * 4, K2 * UNIT"),
    "overlaps the parts of a split product": (
        "tl.program_id(1) * (per_split * UNIT)",
        "tl.program_id(1) * (per_split * 4)",
    ),
    "sums too much in a split": ("tl.minimum(K1, begin + per_split * UNIT)", "K1"),
    "forgets a part of a split product": ("tl.static_range(SPLITS)", "tl.static_range(SPLITS - 1)"),
    "writes the parts of a split over each other": ("tl.program_id(1).to(tl.int64) * M * N", "0 * M * N"),
    "loses tiles of a short group": ("tl.minimum(rows - first, GROUP)", "GROUP"),
}
TILE = {
    "reads past K": ("& (column < K)[None, :], other", "& (column < K + 8)[None, :], other"),
    "writes past the rows": ("mask = (row < M)", "mask = (row < M + 1)"),
    "writes past the columns": ("(column < N)[None, :]\n", "(column < N + 1)[None, :]\n"),
    "wrong stride of x": ("(stride.to(tl.int64) * UNIT)", "K"),
    "wrong stride of the residual": ("r * stride_r + c", "r * N + c"),
    "wrong stride of the output": ("out_ptr + r * N + c", "out_ptr + r * (N + 1) + c"),
    "adds the residual before the activation": ("y = activated(with_bias(acc", "y = activated(1.1 * with_bias(acc"),
    "wrong quick-GELU": ("1.702", "1.602"),
    "leaves out the second part's products": ("acc2 = tl.dot(a, tl.trans(b2), acc2)", "acc2 = acc2"),
}


def run_all(kernels: Any) -> None:
    """Shapes at which each fault below shows."""
    run((270, 106), 104, torch.float16, SMALL, "quick_gelu", residual=True, kernels=kernels)
    run((35, 41), 104, torch.float16, replace(SMALL, splits=2), residual=True, kernels=kernels)
    run((35, 41), 72, torch.float16, SMALL, residual=True, skip=40, kernels=kernels)


@pytest.mark.parametrize("fault", LINEAR)
def test_the_checks_notice_when_linear(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with must_fail():
        run_all(broken_with_importers(module, *LINEAR[fault], [], tmp_path, monkeypatch))


@pytest.mark.parametrize("fault", TILE)
def test_the_checks_notice_when_a_tile(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with must_fail():
        run_all(broken_with_importers(linear_tiles, *TILE[fault], [module], tmp_path, monkeypatch))


GEGLU = {
    "takes the value as the gate": (module, "(N if GATED else COLUMNS1)", "(0 if GATED else COLUMNS1)"),
    "takes the value's bias for the gate's": (module, "bias_ptr, N + c1", "bias_ptr, c1"),
    "sees half of the weight": (module, "W = 2 * N if GATED else N", "W = N"),
    "uses the value inside erf": (module, "value * gelu(gate)", "gate * gelu(value)"),
    "wrong scale inside erf": (linear_tiles, "0.7071067811865476", "0.6"),
}


@pytest.mark.parametrize("fault", GEGLU)
def test_the_checks_notice_when_geglu(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    broken, *change = GEGLU[fault]
    importers = [] if broken is module else [module]
    with must_fail():
        kernels = broken_with_importers(broken, *change, importers, tmp_path, monkeypatch)
        run_geglu((35, 41), 72, torch.float16, Gemm(32, 16, 16, 32, 4, 2), kernels=kernels)


@pytest.mark.parametrize("tma", [False, True])
def test_rows_may_be_further_apart_than_31_bits(tma):
    """Memory that is not touched is not used: the two rows of x and of the residual are 4 GiB apart."""
    if tma and not any(tile.tma for tile in TILES.values()):
        pytest.skip("this GPU has no tensor descriptors")
    memory = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE)
    x, residual = (memory.as_strided((2, 8), (2**31, 1), first) for first in (0, 16))
    for tensor in (x, residual):
        tensor.copy_(rand(2, 8, dtype=torch.float16))
    weight = rand(8, 8, dtype=torch.float16, seed=1).to(DEVICE)
    found = module.linear(x, weight, residual=residual, launch=replace(SMALL, tma=tma))
    wanted = module.linear(x.contiguous(), weight, residual=residual.contiguous(), launch=SMALL)
    assert torch.equal(found, wanted)


def half(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, dtype=torch.float16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.ones(2, 8)}, "float32"),
        ({"weight": torch.ones(4, 8)}, "weight is torch.float32"),
        ({"weight": half(4, 16)}, r"weight has shape \[4, 16\]; it needs \[4, 8\]"),
        ({"bias": half(3)}, r"bias has shape \[3\]; it needs \[4\]"),
        ({"residual": half(2, 5)}, r"residual has shape \[2, 5\]"),
        ({"skip": half(2, 8)}, r"weight has shape \[4, 8\]; it needs \[4, 16\]"),
        ({"x": half(2, 12)[:, 4:]}, "begins at element 4"),
        ({"x": half(2, 4), "weight": half(4, 4)}, "multiples of 8"),
        ({"x": half(8, 2).T}, "strides"),
        ({"x": half(0, 8)}, "0 rows"),
        ({"x": half(2, 8).requires_grad_()}, "no gradients"),
    ],
)
def test_linear_refuses(arguments: dict[str, torch.Tensor], message: str):
    given = {"x": half(2, 8), "weight": half(4, 8)} | arguments
    with pytest.raises(ValueError, match=message):
        module.linear(**given)


def test_geglu_refuses_an_odd_weight():
    with pytest.raises(ValueError, match="value and gate"):
        module.geglu(half(2, 8), half(5, 8), half(5))


def test_sm_75_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module.architecture, "class_of", lambda device: 75)
    with pytest.raises(ValueError, match=launches.UNUSED[75]):
        module.linear(half(2, 8), half(4, 8))
