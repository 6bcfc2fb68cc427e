"""What the kernels of `linear` and `geglu` share: tiles of their operands, the sum over K, and what ends a product.

A program computes two neighbouring tiles of the result at once, of COLUMNS1 and COLUMNS2 columns: 160 columns as
128 + 32, since a tile's sides are powers of two; or the value and the gate of `geglu`. COLUMNS2 may be 0.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_tile(
    x, first, k, rows, K, stride, ROWS: tl.constexpr, DEPTH: tl.constexpr, UNIT: tl.constexpr, TMA: tl.constexpr
):
    """ROWS rows from `first` and DEPTH columns from `k` of x `[rows, K]`, 0 outside: a tensor descriptor with TMA,
    otherwise a pointer, with `stride` units of UNIT elements between rows."""
    if TMA:
        return x.load([first, k])
    else:
        row, column = first + tl.arange(0, ROWS), k + tl.arange(0, DEPTH)
        # K is a number of units, too: the compiler then knows that whole vectors are inside or outside.
        pointers = x + row.to(tl.int64)[:, None] * (stride.to(tl.int64) * UNIT) + column[None, :]
        return tl.load(pointers, mask=(row < rows)[:, None] & (column < K)[None, :], other=0.0)


@triton.jit
def add_products(
    acc1,  # [ROWS, COLUMNS1]
    acc2,  # [ROWS, COLUMNS2]; if COLUMNS2 is 0 any tensor, returned unchanged
    x,
    w,
    w2,  # the descriptor of w with COLUMNS2 rows, or w
    row,  # the first of x
    column1,  # the first rows of w
    column2,
    begin,  # of the columns of x
    end,
    offset,  # of x's columns in those of w
    M,
    W,  # rows of w
    K,  # columns of x
    KW,  # columns of w
    stride_x,
    stride_w,
    ROWS: tl.constexpr,
    COLUMNS1: tl.constexpr,
    COLUMNS2: tl.constexpr,
    DEPTH: tl.constexpr,
    UNIT: tl.constexpr,
    TMA: tl.constexpr,
    EXACT: tl.constexpr,  # columns after which sums of fp8 products move to fp32 registers; None in 16 bits
):
    """Add x w^T over the columns from `begin` to `end` of x."""
    tl.assume(end > begin)  # a loop that may be empty would make the assembler wait for each product
    for k in range(begin, end, DEPTH):
        a = load_tile(x, row, k, M, K, stride_x, ROWS, DEPTH, UNIT, TMA)
        b = load_tile(w, column1, offset + k, W, KW, stride_w, COLUMNS1, DEPTH, UNIT, TMA)
        acc1 = tl.dot(a, tl.trans(b), acc1, max_num_imprecise_acc=EXACT)
        if COLUMNS2 > 0:
            b2 = load_tile(w2, column2, offset + k, W, KW, stride_w, COLUMNS2, DEPTH, UNIT, TMA)
            acc2 = tl.dot(a, tl.trans(b2), acc2, max_num_imprecise_acc=EXACT)
    return acc1, acc2


@triton.jit
def gelu(x):
    """x Phi(x), with the exact erf."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """`fastsd.kernels.linear.activate` in fp32."""
    if ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        return gelu(x)
    elif ACTIVATION == "quick_gelu":
        return x * tl.sigmoid(1.702 * x)
    else:
        return x


@triton.jit
def scaled(acc, scale_x_ptr, scale_w_ptr, row, column, live, within):
    """acc times the scales of its rows and of its columns, where operands are fp8."""
    if scale_x_ptr is not None:
        acc *= tl.load(scale_x_ptr + row, mask=live, other=0.0)[:, None]
        acc *= tl.load(scale_w_ptr + column, mask=within, other=0.0)[None, :]
    return acc


@triton.jit
def with_bias(acc, bias_ptr, column, within):
    """acc plus the bias of its columns, where there is one."""
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + column, mask=within, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def finish(acc, bias_ptr, residual_ptr, out_ptr, row, column, M, N, stride_r, ACTIVATION: tl.constexpr):
    """Write activation(acc + bias) + residual, rounded once, to the rows and columns of out `[M, N]`."""
    y = activated(with_bias(acc, bias_ptr, column, column < N), ACTIVATION)
    mask = (row < M)[:, None] & (column < N)[None, :]
    r, c = row.to(tl.int64)[:, None], column[None, :]
    if residual_ptr is not None:
        y += tl.load(residual_ptr + r * stride_r + c, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + r * N + c, y.to(out_ptr.dtype.element_ty), mask=mask)
