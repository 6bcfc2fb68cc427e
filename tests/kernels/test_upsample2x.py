"""Upsampling, with and without its convolution, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastsd.kernels import dispatch
from fastsd.kernels.cpu import onednn
from fastsd.kernels.upsample2x import OP, upsample2x, upsample2x_conv
from tests.support.precision import DTYPES, check, check_batch, rand

SHAPES = [  # batch, height, width, in, out
    (2, 32, 32, 32, 64),  # large enough for a transposed convolution
    (1, 41, 37, 17, 33),  # the same, all sizes odd
    (1, 1, 1024, 8, 8),  # one row, between rows of padding
    (2, 8, 8, 64, 32),  # small: upsampled, then convolved
    (1, 1, 1, 4, 4),  # one pixel
]


def plain(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
    up = x.repeat_interleave(2, 1).repeat_interleave(2, 2).permute(0, 3, 1, 2)
    return F.conv2d(up, w, b, padding=1).permute(0, 2, 3, 1)


def test_upsample2x_repeats_every_pixel():
    x = torch.arange(12.0).view(1, 2, 3, 2)
    expected = x.repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert torch.equal(upsample2x(x), expected)
    with dispatch.reference_only():
        assert torch.equal(upsample2x(x), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "height", "width", "cin", "cout"), SHAPES)
@torch.no_grad()
def test_upsample2x_conv(batch, height, width, cin, cout, dtype):
    x, b = rand(batch, height, width, cin, dtype=dtype), rand(cout, dtype=dtype)
    w = rand(cout, cin, 3, 3, dtype=dtype, scale=(9 * cin) ** -0.5)
    packed, terms = onednn.pack(w, x.shape, 1, (1, 1, 1, 1)), 9 * cin + 1
    check(upsample2x_conv, plain, x, w, b, roundings=terms)
    check(lambda x, w, b: upsample2x_conv(x, packed, b), plain, x, w, b, roundings=terms)
    check(lambda x, w: upsample2x_conv(x, packed, None), lambda x, w: plain(x, w, None), x, w, roundings=terms)
    with dispatch.reference_only():
        check(upsample2x_conv, plain, x, w, b, roundings=terms)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [32, 5])
@torch.no_grad()
def test_upsample2x_does_not_depend_on_the_batch(size, dtype):
    w, b = rand(24, 16, 3, 3, dtype=dtype), rand(24, dtype=dtype)
    check_batch(upsample2x, rand(3, size, size, 33, dtype=dtype), anywhere=True)
    check_batch(lambda x: upsample2x_conv(x, w, b), rand(3, size, size, 16, dtype=dtype))


def test_upsample2x_conv_gradients():
    tensors = [rand(*s, dtype=torch.float64).requires_grad_(True) for s in ((1, 2, 3, 2), (3, 2, 3, 3), (3,))]
    assert torch.autograd.gradcheck(upsample2x_conv, tensors, fast_mode=True)


def test_phases_are_preferred_where_they_save_more_than_summing_the_weights_costs():
    """The UNet's lowest map is too small: at 8 x 8 the weights are most of the bytes."""

    def first(side: int, channels: int, dtype: torch.dtype = torch.float16) -> str | None:
        x, w = (
            torch.empty(*shape, dtype=dtype, device="meta")
            for shape in ((2, side, side, channels), (channels, channels, 3, 3))
        )
        return OP.first(x, w, None)

    assert first(16, 1280) == first(32, 640) == first(256, 256) == "triton"
    assert first(8, 1280) is first(256, 256, torch.float32) is None
