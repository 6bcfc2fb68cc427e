"""What the attention kernels share: tiles of strided tensors whose last dimension is a head, in parts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def times(stride, UNIT: tl.constexpr):
    """A stride in elements, 64 bits, from one in units (`strides_in_units`)."""
    return stride.to(tl.int64) * UNIT


@triton.jit
def load_tile(
    x_ptr, row, live, stride, D: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr
):
    """Columns START to START + WIDTH of rows of x: 0 beyond D and, with MASKED, where not live. WIDTH is not 0.

    Where a part is absent, the caller says None: Triton 3.6 does not compile a function that returns it.
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
    """Write y `[rows, WIDTH]` where `load_tile` would read it."""
    column = START + tl.arange(0, WIDTH)
    pointers = out_ptr + row.to(tl.int64)[:, None] * stride + column[None, :]
    tl.store(pointers, y.to(out_ptr.dtype.element_ty), mask=live[:, None] & (column < D)[None, :])


@triton.jit
def scores_of(q1, q2, k1, k2, PRECISION: tl.constexpr):
    """q k^T, the parts of the head added."""
    scores = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
    if k2 is not None:
        scores = tl.dot(q2, tl.trans(k2), scores, input_precision=PRECISION)
    return scores


def strides_in_units(*tensors: torch.Tensor) -> tuple[int, list[int]]:
    """A unit, and the strides of the first three dimensions in it, which a kernel multiplies by it again.

    So the compiler knows that rows begin at multiples of 16 bytes, where they do, and loads whole vectors. By itself it
    knows that only of strides that are multiples of 16 elements: heads of 40 are not.
    """
    unit = 16 // tensors[0].element_size()
    used = [stride for x in tensors for size, stride in zip(x.shape[:3], x.stride()) if size > 1]
    unit = unit if all(stride % unit == 0 for stride in used) else 1
    return unit, [stride // unit for x in tensors for stride in x.stride()[:3]]
