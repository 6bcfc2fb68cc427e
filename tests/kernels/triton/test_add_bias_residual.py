"""The kernel of `add_bias_residual` against float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsd.kernels.conv2d import conv2d
from fastsd.kernels.launch.rowwise import ADD_BIAS_RESIDUAL
from fastsd.kernels.launch.rowwise import add_bias_residual as choose
from fastsd.kernels.triton import add_bias_residual as module
from tests.support.triton_checks import DEVICE, DTYPES, LAYOUTS, broken, check, must_fail, rand

CASES = {  # shape
    "the decoder's last convolution": (1, 5, 7, 3),
    "the UNet's top level": (2, 3, 3, 320),
    "a prime": (1, 7, 37),
    "wider than a tile": (3, 300),
    "one column": (5, 1),
    "one row": (1, 64),
}


def run(shape, dtype, bias, residual, relu, layout="contiguous", kernels: Any = module):
    def in_place(y, b, r):
        out = torch.empty_like(y).copy_(y)  # between guard zones
        assert kernels.add_bias_residual(out, b, r, relu) is out
        return out

    def plain(y, b, r):
        y = y if b is None else y + b
        y = y if r is None else y + r
        return y.relu() if relu else y

    b = rand(shape[-1], dtype=dtype, seed=1) if bias else None
    r = rand(*shape, dtype=dtype, seed=2) if residual else None
    check(in_place, plain, rand(*shape, dtype=dtype), b, r, layout=layout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reason", CASES)
def test_add_bias_residual(reason, dtype):
    run(CASES[reason], dtype, True, True, False, "gaps")
    run(CASES[reason], dtype, True, False, True)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 300)),
    st.sampled_from(DTYPES),
    st.tuples(st.booleans(), st.booleans(), st.booleans()),
    st.sampled_from(LAYOUTS),
)
def test_add_bias_residual_at_any_shape(shape, dtype, parts, layout):
    run(shape, dtype, *parts, layout)


def test_relu_keeps_what_is_not_a_number():
    y = torch.tensor([[-1.0, torch.nan, 2.0]], device=DEVICE)
    result = module.add_bias_residual(y, relu=True).cpu()
    assert result[0, 0] == 0 and result[0, 1].isnan() and result[0, 2] == 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_convolution_leaves_bias_residual_and_relu_to_it(dtype, monkeypatch):
    """Each convolution that has any of them takes one pass more, one that has none takes no pass."""
    passes = []
    launch = module.add_bias_residual
    monkeypatch.setattr(module, "add_bias_residual", lambda *a: passes.append(1) or launch(*a))
    x, w = rand(1, 4, 5, 8, dtype=dtype).to(DEVICE), rand(6, 8, 3, 3, dtype=dtype, scale=0.1).to(DEVICE)
    b, r = rand(6, dtype=dtype).to(DEVICE), rand(1, 4, 5, 6, dtype=dtype).to(DEVICE)
    with torch.no_grad():
        y = conv2d(x, w, None, 1, (1, 1, 1, 1))
        assert not passes
        whole = conv2d(x, w, b, 1, (1, 1, 1, 1), r, relu=True)
    assert len(passes) == 1
    # One rounding of the sum, where the convolution's own result was rounded before.
    wanted = (y.float() + b.float() + r.float()).relu()
    torch.testing.assert_close(whole.float(), wanted, rtol=torch.finfo(dtype).eps, atol=0)


MUTATIONS = {
    "reads and writes past the rows": ("row < R", "row < R + 1"),
    "reads and writes past the columns": ("column < C", "column < C + 1"),
    "omits the bias": ("y += tl.load(bias_ptr", "z = tl.load(bias_ptr"),
    "omits the residual": ("y += tl.load(residual_ptr", "z = tl.load(residual_ptr"),
    "wrong stride of the residual": ("r * stride_rr", "r * C"),
    "omits ReLU": ("y = tl.where(y < 0.0", "z = tl.where(y < 0.0"),
    "handles one block of columns": ("-(-columns // launch.block_columns))](", "1)]("),
}


@pytest.mark.parametrize("fault", MUTATIONS)
def test_the_checks_notice_when_add_bias_residual(fault: str, tmp_path: Path):
    copy = broken(module, *MUTATIONS[fault], tmp_path)
    with must_fail():
        run((3, 300), torch.float32, True, True, False, "gaps", kernels=copy)
        run((3, 37), torch.float32, True, True, True, kernels=copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y": torch.ones(2, 8, dtype=torch.float64)}, "float64"),
        ({"y": torch.ones(8, 2).T}, "contiguous"),
        ({"bias": torch.ones(4)}, r"shape \[8\]"),
        ({"residual": torch.ones(3, 8)}, "residual needs the shape"),
        ({"residual": torch.ones(8, 2).T}, "strides"),
        ({"bias": torch.ones(8, requires_grad=True)}, "no gradients"),
    ],
)
def test_add_bias_residual_refuses(changes: dict[str, Any], message: str):
    good = {"y": torch.ones(2, 8), "bias": torch.ones(8), "residual": torch.ones(2, 8)}
    with pytest.raises(ValueError, match=message):
        module.add_bias_residual(**(good | changes))


def test_add_bias_residual_of_no_rows():
    assert module.add_bias_residual(torch.ones(0, 8), torch.ones(8)).shape == (0, 8)


@pytest.mark.parametrize("architecture", ADD_BIAS_RESIDUAL)
def test_launches_of_add_bias_residual_waste_no_column_of_a_model(architecture: int):
    for columns in (128, 256, 320, 512, 640, 960, 1280):
        launch = choose(architecture, columns)
        assert columns % launch.block_columns == 0 and launch.warps in (1, 2, 4, 8, 16)
    for columns in (1, 3, 4, 37, 300):
        assert choose(architecture, columns).block_columns >= min(columns, 256)
