"""The convolution kernel of sm_90 and later: an implicit product over boxes that the copy engine (TMA) reads.

A box is a tile of the map at one tap, `[images, rows, columns, channels]`; what lies outside the map reads as zeros,
which is the padding, and costs no instruction. The box of weights may exceed a tap's channels: there the map's box
holds zeros. So weights must be finite, as loading makes sure.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastsd.kernels.triton.conv2d_tiles import finish, multiply, zeros


@triton.jit
def _conv2d_tma_kernel(
    x_desc,  # [B, H, W, C]; box [IMAGES, ROWS, COLUMNS, BK]
    w1_desc,  # [PHASES * N, TAPS * C]; box [N1, BK]
    w2_desc,  # the same; box [N2, BK]. None if N2 is 0
    bias_ptr,  # [N] or None
    residual_ptr,  # like out_ptr, or None
    scale_x_ptr,  # [B] fp32, of operands in fp8; otherwise None
    scale_w_ptr,  # [N], the same
    out_ptr,  # [B, UP * OH, UP * OW, N]; with SPLITS above 1 fp32 parts, [SPLITS, ...]
    B,
    OH,
    OW,
    top,
    left,
    C: tl.constexpr,
    N: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    UP: tl.constexpr,  # 2: a phase of the upsampling by two, one of four, writes every second row and column
    IMAGES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BK: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    SPLITS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SWAPPED: tl.constexpr,
    EXACT: tl.constexpr,  # of `multiply`
):
    BM: tl.constexpr = IMAGES * ROWS * COLUMNS
    TAPS: tl.constexpr = KH * KW
    STEPS: tl.constexpr = TAPS * ((C + BK - 1) // BK)
    TILES_N: tl.constexpr = (N + N1 + N2 - 1) // (N1 + N2)
    n0 = tl.program_id(0) % TILES_N * (N1 + N2)
    tile = tl.program_id(0) // TILES_N
    across, down = tl.cdiv(OW, COLUMNS), tl.cdiv(OH, ROWS)
    x0 = tile % across * COLUMNS
    y0 = tile // across % down * ROWS
    b0 = tile // across // down * IMAGES
    phase = tl.program_id(1)
    odd_row, odd_column = phase // 2, phase % 2
    split = tl.program_id(2)
    row, column = y0 - top + odd_row, x0 - left + odd_column

    acc1 = zeros(BM, N1, SWAPPED)
    acc2 = acc1  # a placeholder without a second part
    if N2 > 0:
        acc2 = zeros(BM, N2, SWAPPED)
    first, end = split * STEPS // SPLITS, (split + 1) * STEPS // SPLITS
    tl.assume(end > first)  # for a loop that may be empty, the assembler makes each product wait for the last
    for k in tl.range(first, end):
        tap, c = k % TAPS, k // TAPS * BK  # neighbouring taps read the same lines
        x = x_desc.load([b0, row + tap // KW, column + tap % KW, c]).reshape(BM, BK)
        acc1 = multiply(x, w1_desc.load([phase * N + n0, tap * C + c]), acc1, SWAPPED, EXACT)
        if N2 > 0:
            acc2 = multiply(x, w2_desc.load([phase * N + n0 + N1, tap * C + c]), acc2, SWAPPED, EXACT)

    m = tl.arange(0, BM)
    b, y, x = m // (ROWS * COLUMNS), m // COLUMNS % ROWS, m % COLUMNS
    live = (b0 + b < B) & (y0 + y < OH) & (x0 + x < OW)
    height, width = UP * OH, UP * OW
    origin = (b0.to(tl.int64) * height + y0 * UP + odd_row) * width + x0 * UP + odd_column
    pixel = (b * height + y * UP) * width + x * UP
    if SPLITS > 1:
        origin += tl.cast(split, tl.int64) * B * height * width
    # fmt: off
    finish(acc1, out_ptr, bias_ptr, residual_ptr, scale_x_ptr, scale_w_ptr, origin, pixel, live, b0 + b,
           n0 + tl.arange(0, N1), N, SPLITS, ACTIVATION, SWAPPED)
    if N2 > 0:
        finish(acc2, out_ptr, bias_ptr, residual_ptr, scale_x_ptr, scale_w_ptr, origin, pixel, live, b0 + b,
               n0 + N1 + tl.arange(0, N2), N, SPLITS, ACTIVATION, SWAPPED)
    # fmt: on
