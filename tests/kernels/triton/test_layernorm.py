"""The kernel of `layernorm` against float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsd.kernels.launch.rowwise import LAYERNORM, row_stride
from fastsd.kernels.launch.rowwise import layernorm as choose
from fastsd.kernels.triton import layernorm as module
from tests.support.triton_checks import DEVICE, DTYPES, LAYOUTS, broken, check, must_fail, rand

EPS = 1e-5
CASES = {  # rows, columns, mean, standard deviation
    "two rows per program, the last one alone": (3, 1000, 0.0, 1.0),
    "CLIP": (5, 768, 0.0, 1.0),
    "a prime": (7, 37, 0.0, 1.0),
    "one column": (2, 1, 0.0, 1.0),
    "one row": (1, 64, 0.0, 1.0),
    "E[x^2] - E[x]^2 would cancel": (3, 333, 30.0, 1e-3),
    "eps decides": (3, 64, 0.0, 1e-6),
    "large activations": (3, 64, 0.0, 1e4),
}


def plain(x, weight, bias, *vectors, owed):
    if owed:
        x = x - sum(vectors)
    y = F.layer_norm(x, weight.shape, weight, bias, EPS)
    return (y, x + sum(vectors)) if vectors and not owed else y


def run(shape, dtype, vectors=0, owed=False, layout="contiguous", mean=0.0, std=1.0, kernels: Any = module):
    """vectors: how many are added ahead or, with `owed`, taken off."""
    like, columns = {"dtype": dtype, "mean": mean, "scale": std}, shape[-1]
    w, b = rand(columns, dtype=dtype), rand(columns, dtype=dtype, seed=1)
    name = "owed" if owed else "ahead"
    check(
        lambda x, w, b, *v: kernels.layernorm(x, w, b, EPS, **{name: v}),
        lambda *inputs: plain(*inputs, owed=owed),
        *(
            rand(*shape, **like),
            w,
            b,
            *[rand(columns, dtype=dtype, scale=min(std, 1.0), seed=2 + i) for i in range(vectors)],
        ),
        layout=layout,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reason", CASES)
def test_layernorm(reason, dtype):
    rows, columns, mean, std = CASES[reason]
    run((rows, columns), dtype, 0, False, "gaps", mean, std)
    run((1, rows, columns), dtype, 3, False, "offset", mean, std)
    run((rows, columns), dtype, 2, True, "gaps", mean, std)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 300)),
    st.sampled_from(DTYPES),
    st.integers(0, 3),
    st.booleans(),
    st.sampled_from(LAYOUTS),
)
def test_layernorm_at_any_shape(shape, dtype, vectors, owed, layout):
    run(shape, dtype, vectors, owed, layout)


def test_layernorm_does_not_depend_on_the_batch():
    x, w = rand(5, 3, 320, dtype=torch.float32).to(DEVICE), torch.ones(320, device=DEVICE)
    whole = module.layernorm(x, w, w, EPS)
    assert all(torch.equal(whole[i], module.layernorm(x[i], w, w, EPS)) for i in range(5))


MUTATIONS = {
    "reads and writes past the rows": ("row < R", "row < R + 1"),
    "reads and writes past the columns": ("column < C", "column < BLOCK_C"),
    "divides by the padded width": ("tl.sum(y * y, 1) / C", "tl.sum(y * y, 1) / BLOCK_C"),
    "takes the mean of the padded width": ("tl.sum(y, 1) / C", "tl.sum(y, 1) / BLOCK_C"),
    "includes the padding": (
        "tl.where(mask, y - (tl.sum(y, 1) / C)[:, None], 0.0)",
        "y - (tl.sum(y, 1) / C)[:, None]",
    ),
    "omits eps": ("variance + eps", "variance"),
    "omits the bias": (" + bias[None, :]", ""),
    "wrong stride of x": ("r * stride_xr", "r * C"),
    "wrong stride of the output": ("out_ptr + r * C", "out_ptr + r * stride_xr"),
    "wrong stride of the sum": ("sum_ptr + r * C", "sum_ptr + r * stride_xr"),
    "returns x for the sum": ("(y + vectors[None, :])", "y"),
    "normalises the sum": ("        else:\n            y -= ", "        if True:\n            y += "),
    "adds what is owed": ("y -= vectors", "y += vectors"),
    "omits the second vector": ("vectors, second_ptr", "vectors * 0, second_ptr"),
    "omits the third vector": ("if third_ptr is not None", "if False"),
}


@pytest.mark.parametrize("fault", MUTATIONS)
def test_the_checks_notice_when_layernorm(fault: str, tmp_path: Path):
    copy = broken(module, *MUTATIONS[fault], tmp_path)
    with must_fail():
        run((3, 700), torch.float32, 3, False, "gaps", mean=3.0, kernels=copy)
        run((3, 64), torch.float32, 3, True, kernels=copy)
        run((3, 64), torch.float32, std=1e-6, kernels=copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.ones(2, 8, dtype=torch.float64)}, "float64"),
        ({"weight": torch.ones(4)}, r"shape \[8\]"),
        ({"ahead": (torch.ones(7),)}, r"shape \[8\]"),
        ({"owed": (torch.ones(8),) * 4}, "up to three"),
        ({"owed": (torch.ones(8),), "ahead": (torch.ones(8),)}, "the other none"),
        ({"x": torch.ones(8, 2).T}, "strides"),
        ({"x": torch.ones(2, 3, 8).transpose(0, 1)}, "strides"),
        ({"bias": torch.ones(8, requires_grad=True)}, "no gradients"),
        ({"x": torch.ones(1, 20000), "weight": torch.ones(20000), "bias": torch.ones(20000)}, "1 to 16384"),
    ],
)
def test_layernorm_refuses(changes: dict[str, Any], message: str):
    good = {"x": torch.ones(2, 8), "weight": torch.ones(8), "bias": torch.ones(8), "eps": EPS}
    with pytest.raises(ValueError, match=message):
        module.layernorm(**(good | changes))


def test_layernorm_of_no_rows():
    assert module.layernorm(torch.ones(0, 8), torch.ones(8), torch.ones(8), EPS).shape == (0, 8)


def test_row_stride():
    assert row_stride("x", torch.ones(2, 3, 8)) == 8
    assert row_stride("x", torch.ones(4, 3, 8)[:, :, 2:5]) == 8
    assert row_stride("x", torch.ones(5, 1, 8)[::2]) == 16
    assert row_stride("x", torch.ones(8)) == 0
    assert row_stride("x", torch.ones(1, 8).expand(3, 8)) == 0
    with pytest.raises(ValueError, match="one stride"):
        row_stride("x", torch.ones(3, 4, 8)[:, :3])


@pytest.mark.parametrize("architecture", LAYERNORM)
def test_launches_of_layernorm_hold_a_row(architecture: int):
    for columns in (1, 37, 320, 640, 768, 1024, 1280, 2048, module.WIDEST):
        launch = choose(architecture, columns)
        assert launch.block_columns >= columns and launch.warps in (1, 2, 4, 8, 16)
