"""fp8 convolutions: one scale for a map, and how much its rounding may change a result."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastsd.kernels import dispatch
from fastsd.kernels.conv2d_fp8 import OP, conv2d_fp8, conv2d_fp8_ref, quantize_maps
from fastsd.kernels.linear_fp8 import FP8, linear_fp8, quantize
from tests.support.precision import rand

SAME = (1, 1, 1, 1)
LEAST = 2.0**-9  # the smallest number of e4m3; numbers below 2^-6 are multiples of it


def weight_of(outputs: int, inputs: int, kernel: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """In float64, in fp8 and its scales; channels come last."""
    w = rand(outputs, kernel, kernel, inputs, dtype=torch.float64, scale=(kernel**2 * inputs) ** -0.5)
    values, scale = quantize_maps(w)
    return w.permute(0, 3, 1, 2), values.permute(0, 3, 1, 2), scale


def test_a_map_has_one_scale():
    x = torch.stack([rand(4, 5, 16, dtype=torch.float32), 300 * rand(4, 5, 16, dtype=torch.float32, seed=1)])
    values, scales = quantize_maps(x)
    assert values.dtype == FP8 and values.shape == x.shape and scales.shape == (2,)
    for one, value, scale in zip(x, values, scales):
        flat, own = quantize(one.flatten())
        assert torch.equal(value.float().flatten(), flat.float()) and scale == own


@pytest.mark.parametrize(("stride", "padding"), [(1, SAME), (2, SAME), (2, (0, 1, 0, 1))])
def test_the_error_is_that_of_two_roundings(stride, padding):
    """|y - conv(x, w)| <= sum of |x| |w| (2 * 2^-4 + 2^-8), and what numbers near 0 lose besides."""
    x, (w, weight, scale) = rand(2, 7, 6, 64, dtype=torch.float64), weight_of(24, 64)

    def conv(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.pad(x.permute(0, 3, 1, 2), padding), w, None, stride).permute(0, 2, 3, 1)

    error = (conv2d_fp8_ref(x, weight, scale, None, stride, padding) - conv(x, w)).abs()
    maps = quantize_maps(x)[1].double()[:, None, None, None].expand(x.shape)
    lost_x, lost_w = LEAST / 2 * maps, LEAST / 2 * scale.double()[:, None, None, None].expand(w.shape)
    near_zero = conv(lost_x, w.abs()) + conv(x.abs(), lost_w)
    allowed = (2 / 16 + 1 / 256) * conv(x.abs(), w.abs()) + (1 + 2.0**-4) * near_zero + conv(lost_x, lost_w)
    assert bool((error <= allowed).all())
    assert error.max() > 1e-3  # it is not computed in a wider dtype


def test_one_tap_over_one_pixel_is_the_product():
    """Of a map of one pixel, whose scale is that of the row."""
    x, (_, weight, scale) = rand(3, 1, 1, 48, dtype=torch.float32), weight_of(24, 48, 1)
    bias, residual = rand(24, dtype=torch.float32), rand(3, 1, 1, 24, dtype=torch.float32)
    found = conv2d_fp8(x, weight, scale, bias, 1, (0, 0, 0, 0), residual)
    product = linear_fp8(x, weight.flatten(1), scale, bias, "none", residual)
    # Sums of 48 products in two orders, and two additions; numbers are below 8.
    assert (found - product).abs().max() <= 2 * 50 * 2.0**-24 * 8
    with dispatch.reference_only():
        assert torch.equal(conv2d_fp8(x, weight, scale, bias, 1, (0, 0, 0, 0), residual), found)


@pytest.mark.parametrize("name", ["16 bits", "torch"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 8.0])
def test_16_bits_compute_with_the_same_numbers(name, dtype, scale):
    """The convolution rounds once, a bias and a residual once more each; sums of 144 products in fp32 round by less."""
    x, (_, weight, scales) = (scale * rand(2, 5, 4, 16, dtype=torch.float64)).to(dtype), weight_of(24, 16)
    bias, residual = (
        (scale * rand(24, dtype=torch.float64)).to(dtype),
        (scale * rand(2, 3, 2, 24, dtype=torch.float64)).to(dtype),
    )
    truth = conv2d_fp8_ref(x.double(), weight, scales, bias, 2, SAME, residual)
    candidate = OP.candidate(name)
    assert candidate is not None
    found = candidate.run(x, weight, scales, bias, 2, SAME, residual)
    unit, least = torch.finfo(dtype).eps / 2, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    largest = (truth - residual).abs().max() + residual.abs().max() + bias.abs().max()
    assert found.dtype == dtype and (found - truth).abs().max() <= 3 * unit * largest + 3 * least
