"""The convolution kernel of sm_80 and later: an implicit product over pixels that are read by their addresses.

It takes what the copy engine of sm_90 does not: strides of two, and channels that are no multiple of 8.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastsd.kernels.triton.conv2d_tiles import finish, multiply, zeros


@triton.jit(do_not_specialize=["B", "H", "W", "OH", "OW", "top", "left"])
def _conv2d_pointers_kernel(
    x_ptr,  # [B, H, W, C]
    w_ptr,  # [PHASES, N, KH, KW, C]
    bias_ptr,  # [N] or None
    residual_ptr,  # like out_ptr, or None
    scale_x_ptr,  # [B] fp32, of operands in fp8; otherwise None
    scale_w_ptr,  # [N], the same
    out_ptr,  # [B, UP * OH, UP * OW, N]; with SPLITS above 1 fp32 parts, [SPLITS, ...]
    B,
    H,
    W,
    OH,
    OW,
    top,
    left,
    C: tl.constexpr,
    N: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIDE: tl.constexpr,
    UP: tl.constexpr,  # 2: a phase of the upsampling by two, one of four, writes every second row and column
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLITS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EXACT: tl.constexpr,  # of `multiply`
):
    TAPS: tl.constexpr = KH * KW
    STEPS: tl.constexpr = TAPS * ((C + BK - 1) // BK)
    TILES_N: tl.constexpr = (N + BN - 1) // BN
    n0 = tl.program_id(0) % TILES_N * BN
    start = tl.program_id(0) // TILES_N * BM
    phase = tl.program_id(1)
    odd_row, odd_column = phase // 2, phase % 2
    split = tl.program_id(2)

    m = start + tl.arange(0, BM)
    live = m < B * OH * OW
    b, y, x = m // (OH * OW), m // OW % OH, m % OW
    row, column = y * STRIDE - top + odd_row, x * STRIDE - left + odd_column
    # Addresses are 32-bit offsets from a 64-bit one near the tile: a map may have more than 2^31 elements.
    near = (start // (OH * OW) * H + start // OW % OH * STRIDE) * W
    x_ptr += near.to(tl.int64) * C
    corner = (b * H + row) * W + column - near
    n, c = n0 + tl.arange(0, BN), tl.arange(0, BK)
    w_ptr += (phase * N + n0).to(tl.int64) * (TAPS * C)
    w_offset = tl.arange(0, BN)[:, None] * (TAPS * C) + c[None, :]

    acc = zeros(BM, BN, False)
    first, end = split * STEPS // SPLITS, (split + 1) * STEPS // SPLITS
    tl.assume(end > first)
    for k in tl.range(first, end):
        tap, channel = k % TAPS, k // TAPS * BK  # neighbouring taps read the same lines
        dy, dx = tap // KW, tap % KW
        inside = live & (row + dy >= 0) & (row + dy < H) & (column + dx >= 0) & (column + dx < W)
        x_mask, w_mask = inside[:, None], (n < N)[:, None]
        if C % BK != 0:
            x_mask, w_mask = x_mask & (channel + c < C)[None, :], w_mask & (channel + c < C)[None, :]
        x_offset = ((corner + dy * W + dx) * C + channel)[:, None] + c[None, :]
        tile = tl.load(x_ptr + x_offset, mask=x_mask, other=0.0)
        weights = tl.load(w_ptr + (tap * C + channel) + w_offset, mask=w_mask, other=0.0)
        acc = multiply(tile, weights, acc, False, EXACT)

    height, width = UP * OH, UP * OW
    origin = (start // (OH * OW) * height + start // OW % OH * UP) * width
    pixel = (b * height + y * UP + odd_row) * width + x * UP + odd_column - origin
    origin = origin.to(tl.int64)
    if SPLITS > 1:
        origin += split.to(tl.int64) * B * height * width
    # fmt: off
    finish(acc, out_ptr, bias_ptr, residual_ptr, scale_x_ptr, scale_w_ptr, origin, pixel, live, b, n,
           N, SPLITS, ACTIVATION, False)
    # fmt: on
