"""fp8 products: what is rounded, how, and how much that may change a result."""

from __future__ import annotations

import math

import pytest
import torch

from fastsd.kernels import dispatch
from fastsd.kernels.linear import linear_ref
from fastsd.kernels.linear_fp8 import FP8, linear_fp8, linear_fp8_ref, quantize, row_scales
from tests.support.precision import rand

LEAST = 2.0**-9  # the smallest number of e4m3; numbers below 2^-6 are multiples of it


@pytest.mark.parametrize("largest", [448.0, 448.5, 449.0, 447.0, 1.0, 1.75, 1.7500001, 3e-5, 65504.0, 3e38, 1e-38])
def test_a_scale_is_the_smallest_power_of_two(largest):
    scale = row_scales(torch.tensor([[-largest, 0.0]])).item()
    assert math.frexp(scale)[0] == 0.5 and torch.tensor(largest).item() / scale <= 448
    assert torch.tensor(largest).item() / (scale / 2) > 448 or scale == 2.0**-126


def test_rows_without_numbers():
    """Zeros stay zeros, what is no number stays none, and what is infinite is larger than all else."""
    x = torch.tensor([[0.0, 0.0], [math.nan, 1.0], [math.inf, 1.0]])
    values, scales = quantize(x)
    wide = values.float() * scales[:, None]
    assert wide[0].tolist() == [0, 0] and wide[1].isnan()[0] and wide[2, 0] > 1e30


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 300.0])
def test_values_are_rounded_to_nearest(scale, dtype):
    x = rand(7, 96, dtype=dtype, scale=scale)
    values, scales = quantize(x)
    assert values.dtype == FP8 and scales.dtype == torch.float32
    error = (values.double() * scales.double()[:, None] - x.double()).abs()
    # Half a unit in the last of four significant bits, or of the smallest number.
    assert bool((error <= torch.maximum(x.double().abs() / 16, scales.double()[:, None] * LEAST / 2)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_is_that_of_the_quantised_numbers(dtype):
    x, w, b, r = (
        rand(2, 5, 48, dtype=dtype),
        rand(24, 48, dtype=dtype),
        rand(24, dtype=dtype),
        rand(2, 5, 24, dtype=dtype),
    )
    (weight, scale), (values, scales) = quantize(w), quantize(x)
    wide = (values.double() * scales.double()[..., None]) @ (weight.double() * scale.double()[:, None]).T
    truth = torch.nn.functional.silu(wide + b.double()) + r.double()
    # Sums of 48 products in fp32, and one rounding.
    allowed = (
        48 * 2.0**-24 * (values.double().abs() * scales.double()[..., None]).sum(-1).max() * w.abs().max().double()
    )
    allowed = allowed + torch.finfo(dtype).eps * truth.abs().max()
    assert bool(((linear_fp8(x, weight, scale, b, "silu", r).double() - truth).abs() <= allowed).all())


def test_the_error_is_that_of_two_roundings():
    """|y - x w| <= sum of |x| |w| (2 * 2^-4 + 2^-8), and what numbers near 0 lose besides."""
    x, w = rand(9, 320, dtype=torch.float64), rand(64, 320, dtype=torch.float64)
    weight, scale = quantize(w)
    scales = quantize(x)[1].double()
    error = (linear_fp8_ref(x, weight, scale) - linear_ref(x, w)).abs()
    near_zero = (
        LEAST / 2 * (scales[:, None] * w.abs().sum(-1) + scale.double() * x.abs().sum(-1)[:, None]) * (1 + 2.0**-4)
    )
    near_zero += 320 * (LEAST / 2) ** 2 * scales[:, None] * scale.double()
    assert bool((error <= (2 / 16 + 1 / 256) * (x.abs() @ w.abs().T) + near_zero).all())
    assert error.max() > 1e-3  # it is not computed in a wider dtype


def test_a_skip_input_is_further_columns():
    x, skip, w = (
        rand(2, 3, 32, dtype=torch.float32),
        rand(2, 3, 16, dtype=torch.float32, scale=9.0),
        rand(8, 48, dtype=torch.float32),
    )
    whole = linear_fp8(torch.cat([x, skip], -1), *quantize(w))
    assert torch.equal(linear_fp8(x, *quantize(w), skip=skip), whole)
    with dispatch.reference_only():
        assert torch.equal(linear_fp8(x, *quantize(w), skip=skip), whole)
