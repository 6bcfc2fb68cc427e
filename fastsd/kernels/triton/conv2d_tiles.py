"""What the convolution kernels share: a step's product, the epilogue, and the sum of a split's parts.

A tile is pixels x output channels. Its channels may be two parts, 128 + 32 for the multiples of 160 in Stable
Diffusion, because the sizes of a tile are powers of two; both parts multiply the same pixels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastsd.kernels.triton.linear_tiles import scaled


@triton.jit
def multiply(x, w, acc, SWAPPED: tl.constexpr, EXACT: tl.constexpr):
    """acc + the product of pixels x `[BM, BK]` and weights w `[BN, BK]`, as `[BM, BN]`, or transposed.

    EXACT: columns after which sums of fp8 products move to fp32 registers; None in 16 bits.
    """
    if SWAPPED:
        return tl.dot(w, tl.trans(x), acc, max_num_imprecise_acc=EXACT)
    else:
        return tl.dot(x, tl.trans(w), acc, max_num_imprecise_acc=EXACT)


@triton.jit
def zeros(BM: tl.constexpr, BN: tl.constexpr, SWAPPED: tl.constexpr):
    """The sums of a tile before its first step."""
    if SWAPPED:
        return tl.zeros([BN, BM], tl.float32)
    else:
        return tl.zeros([BM, BN], tl.float32)


@triton.jit
def finish(
    acc,  # [BM, BN]; transposed if SWAPPED
    out_ptr,  # [pixels, N]; with SPLITS above 1 fp32 parts, [SPLITS, pixels, N]
    bias_ptr,  # [N] or None
    residual_ptr,  # [pixels, N] or None
    scale_x_ptr,  # [B] fp32, of operands in fp8; otherwise None
    scale_w_ptr,  # [N], the same
    origin,  # a pixel near the tile's, 64-bit
    pixel,  # [BM] pixels of the tile, relative to `origin`
    live,  # [BM]
    image,  # [BM] of each pixel
    column,  # [BN] output channels
    N: tl.constexpr,
    SPLITS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SWAPPED: tl.constexpr,
):
    """Write a tile, with bias, residual and activation unless it is a part of a split."""
    if SWAPPED:
        acc = tl.trans(acc)
    acc = scaled(acc, scale_x_ptr, scale_w_ptr, image, column, live, column < N)
    mask = live[:, None] & (column < N)[None, :]
    offset = pixel[:, None] * N + column[None, :]
    out_ptr += origin * N
    if SPLITS == 1:
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
        if residual_ptr is not None:
            acc += tl.load(residual_ptr + origin * N + offset, mask=mask, other=0.0).to(tl.float32)
        acc = activate(acc, ACTIVATION)
    tl.store(out_ptr + offset, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def activate(y, ACTIVATION: tl.constexpr):
    """`y` through "none", "relu" (a NaN stays one) or "silu"."""
    if ACTIVATION == "relu":
        y = tl.where(y < 0.0, 0.0, y)
    elif ACTIVATION == "silu":
        y = y / (1.0 + tl.exp(-y))
    return y


@triton.jit
def _conv2d_sum_kernel(
    parts_ptr,  # [SPLITS, size] fp32
    bias_ptr,  # [N] or None
    residual_ptr,  # [size] or None
    out_ptr,  # [size]
    size,  # pixels times N
    N: tl.constexpr,
    SPLITS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum of a split's parts, always in the same order, then the epilogue of `finish`."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    live = start + lane < size
    y = tl.zeros([BLOCK], tl.float32)
    for _ in tl.static_range(SPLITS):
        y += tl.load(parts_ptr + start + lane, mask=live, other=0.0)
        parts_ptr += tl.cast(size, tl.int64)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + ((start % N).to(tl.int32) + lane) % N, mask=live, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + start + lane, mask=live, other=0.0).to(tl.float32)
    tl.store(out_ptr + start + lane, activate(y, ACTIVATION).to(out_ptr.dtype.element_ty), mask=live)
