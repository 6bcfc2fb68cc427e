"""What the attention kernels share: tiles of strided tensors whose last dimension is a head, split into parts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def times(stride, UNIT: tl.constexpr):
    """The 64-bit stride in elements of a stride in units (`strides_in_units`)."""
    return stride.to(tl.int64) * UNIT


@triton.jit
def load_tile(
    x_ptr, row, live, stride, D: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr
):
    """Columns START to START + WIDTH of rows of x: 0 beyond D and, with MASKED, where not live.

    WIDTH is not 0. For an absent part callers use None, which no function may return under Triton 3.6.
    """
    column = START + tl.arange(0, WIDTH)
    pointers = x_ptr + row.to(tl.int64)[:, None] * stride + column[None, :]
    if MASKED:
        return tl.load(pointers, mask=live[:, None] & (column < D)[None, :], other=0.0)
    elif START + WIDTH > D:
        return tl.load(pointers, mask=(column < D)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def store_tile(out_ptr, y, row, live, stride, D: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr):
    """Write y `[rows, WIDTH]` where `load_tile` reads it."""
    column = START + tl.arange(0, WIDTH)
    pointers = out_ptr + row.to(tl.int64)[:, None] * stride + column[None, :]
    tl.store(pointers, y.to(out_ptr.dtype.element_ty), mask=live[:, None] & (column < D)[None, :])


@triton.jit
def scores_of(q1, q2, k1, k2, PRECISION: tl.constexpr):
    """q k^T, summed over the parts of the head."""
    scores = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
    if k2 is not None:
        scores = tl.dot(q2, tl.trans(k2), scores, input_precision=PRECISION)
    return scores


def strides_in_units(*tensors: torch.Tensor) -> tuple[int, list[int]]:
    """A unit, and the strides of the first three dimensions divided by it, which kernels multiply again.

    Thus the compiler knows when rows begin at multiples of 16 bytes, and loads whole vectors. Otherwise it recognises
    only strides that are multiples of 16 elements, which excludes heads of 40.
    """
    unit = 16 // tensors[0].element_size()
    used = [stride for x in tensors for size, stride in zip(x.shape[:3], x.stride()) if size > 1]
    unit = unit if all(stride % unit == 0 for stride in used) else 1
    return unit, [stride // unit for x in tensors for stride in x.stride()[:3]]
