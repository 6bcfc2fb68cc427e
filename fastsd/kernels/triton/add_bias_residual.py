"""What a convolution by cuDNN leaves to do, in one pass over its result: bias, residual, ReLU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastsd.kernels.launch import OPTIONS, architecture
from fastsd.kernels.launch.rowwise import RowwiseLaunch, row_stride
from fastsd.kernels.launch.rowwise import add_bias_residual as choose

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@triton.jit
def _add_bias_residual_kernel(
    y_ptr,  # [R, C], changed in place
    bias_ptr,  # [C] or None
    residual_ptr,  # [R, C] or None
    R,
    C,
    stride_rr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    RELU: tl.constexpr,
):
    # Rows in the first dimension of the grid, which is not limited to 65535 programs.
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    r, c, within = row.to(tl.int64)[:, None], column[None, :], (column < C)[None, :]
    mask = (row < R)[:, None] & within
    y = tl.load(y_ptr + r * C + c, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + c, mask=within, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + r * stride_rr + c, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        y = tl.where(y < 0.0, 0.0, y)  # keeps NaN, as PyTorch does
    tl.store(y_ptr + r * C + c, y.to(y_ptr.dtype.element_ty), mask=mask)


def add_bias_residual(
    y: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    relu: bool = False,
    launch: RowwiseLaunch | None = None,
) -> torch.Tensor:
    """`y + bias + residual` in the place of `y`, then clamped at zero with `relu`; summed in fp32, rounded once.

    Args:
        y: `[..., C]` fp16, bf16 or fp32, contiguous.
        bias: `[C]` contiguous.
        residual: like y, with one stride between rows.
        launch: overrides the launch table.

    Returns:
        `y`.

    Raises:
        ValueError: shapes, strides or dtypes that the kernel does not take, or gradients, which it lacks.
    """
    columns = y.shape[-1]
    if y.dtype not in DTYPES:
        raise ValueError(f"add_bias_residual: y is {y.dtype}; the kernel takes float16, bfloat16 and float32")
    if not y.is_contiguous():
        raise ValueError(f"add_bias_residual: y has strides {list(y.stride())}; it needs to be contiguous")
    if bias is not None and (bias.shape != (columns,) or not bias.is_contiguous()):
        raise ValueError(f"add_bias_residual: bias needs shape [{columns}], contiguous")
    if residual is not None and (residual.shape != y.shape or residual.dtype != y.dtype):
        raise ValueError("add_bias_residual: residual needs the shape and the dtype of y")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (y, bias, residual)):
        raise ValueError("add_bias_residual: the kernel has no gradients; use the torch backend for training")
    if y.numel():
        rows = y.numel() // columns
        residual_stride = 0 if residual is None else row_stride("add_bias_residual: residual", residual)
        launch = launch or choose(architecture.class_of(y.device), columns)
        with torch.cuda.device_of(y):
            _add_bias_residual_kernel[(-(-rows // launch.block_rows), -(-columns // launch.block_columns))](
                *(y, bias, residual, rows, columns, residual_stride),
                BLOCK_R=launch.block_rows,
                BLOCK_C=launch.block_columns,
                RELU=relu,
                num_warps=launch.warps,
                **OPTIONS,
            )
    return y
