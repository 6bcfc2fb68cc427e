"""The kernel of `geglu` against float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsd.kernels.triton import geglu as module
from tests.support.triton_checks import DTYPES, LAYOUTS, broken, check, must_fail, rand

CASES = {  # rows, columns of the value, scale
    "several column blocks, the last one short": (3, 600, 1.0),
    "several row blocks, the last one short": (11, 250, 1.0),
    "a prime": (5, 37, 1.0),
    "one column": (1, 1, 1.0),
    "SD1.5 at 8 x 8": (2, 5120, 1.0),
    "large gates, where GELU is 0 or the gate": (4, 64, 100.0),
    "gates near 0": (4, 64, 1e-4),
}


def plain(y, bias):
    value, gate = (y if bias is None else y + bias).chunk(2, -1)
    return value * F.gelu(gate)


def run(shape, dtype, bias, layout="contiguous", scale=1.0, kernels: Any = module):
    """shape: of the result."""
    columns = 2 * shape[-1]
    y = rand(*shape[:-1], columns, dtype=dtype, scale=scale)
    check(kernels.geglu_gate, plain, y, rand(columns, dtype=dtype, seed=1) if bias else None, layout=layout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reason", CASES)
def test_geglu(reason, dtype):
    rows, columns, scale = CASES[reason]
    run((rows, columns), dtype, False, "gaps", scale)
    run((1, rows, columns), dtype, True, "offset", scale)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 300)),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.sampled_from(LAYOUTS),
)
def test_geglu_at_any_shape(shape, dtype, bias, layout):
    run(shape, dtype, bias, layout)


MUTATIONS = {
    "writes past the rows": ("row < R", "row < R + 1"),
    "writes past the columns": ("column < N", "column < N + 1"),
    "uses the value as the gate": ("stride_yr + (N + c)", "stride_yr + c"),
    "uses the value's bias for the gate": ("bias_ptr + N + c", "bias_ptr + c"),
    "wrong stride of the rows": ("y_ptr + r * stride_yr + c", "y_ptr + r * 2 * N + c"),
    "wrong stride of the output": ("out_ptr + r * N", "out_ptr + r * (N + 1)"),
    "uses the value inside erf": ("tl.erf(gate", "tl.erf(value"),
    "wrong scale inside erf": ("0.7071067811865476", "0.70"),
    "misses a column block": ("tl.program_id(1) * BLOCK_N", "0 * BLOCK_N"),
}


@pytest.mark.parametrize("fault", MUTATIONS)
def test_the_checks_notice_when_geglu(fault: str, tmp_path: Path):
    copy = broken(module, *MUTATIONS[fault], tmp_path)
    with must_fail():
        run((3, 300), torch.float32, True, "gaps", kernels=copy)


@pytest.mark.parametrize(
    ("y", "bias", "message"),
    [
        (torch.ones(2, 8, dtype=torch.float64), None, "float64"),
        (torch.ones(2, 7), None, "even number"),
        (torch.ones(2, 8), torch.ones(4), r"shape \[8\]"),
        (torch.ones(8, 2).T, None, "strides"),
        (torch.ones(2, 8, requires_grad=True), None, "no gradients"),
    ],
)
def test_geglu_refuses(y: torch.Tensor, bias: torch.Tensor | None, message: str):
    with pytest.raises(ValueError, match=message):
        module.geglu_gate(y, bias)
