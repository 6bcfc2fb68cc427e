"""`layernorm` on the GPU, with the addition of a residual in the same pass (Ba et al. 2016, equation 4)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastsd.kernels.launch import OPTIONS, architecture
from fastsd.kernels.launch.rowwise import RowwiseLaunch, row_stride
from fastsd.kernels.launch.rowwise import layernorm as choose

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
WIDEST = 16384  # columns of a row, which stays in registers


@triton.jit
def _layernorm_kernel(
    x_ptr,  # [R, C]
    residual_ptr,  # [R, C] or None
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    out_ptr,  # [R, C]
    sum_ptr,  # [R, C] with a residual
    R,
    C,
    eps,
    stride_xr,
    stride_rr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row, column = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C)
    r, c, within = row.to(tl.int64)[:, None], column[None, :], column < C
    mask = (row < R)[:, None] & within[None, :]
    y = tl.load(x_ptr + r * stride_xr + c, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + r * stride_rr + c, mask=mask, other=0.0).to(tl.float32)
        tl.store(sum_ptr + r * C + c, y.to(sum_ptr.dtype.element_ty), mask=mask)
    # Two passes over registers. The second also computes the error of the mean (Chan et al. 1983, equation 1.7).
    y = tl.where(mask, y - (tl.sum(y, 1) / C)[:, None], 0.0)
    error = tl.sum(y, 1) / C
    variance = tl.sum(y * y, 1) / C - error * error
    rstd = 1.0 / tl.sqrt_rn(variance + eps)
    weight = tl.load(weight_ptr + column, mask=within, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=within, other=0.0).to(tl.float32)
    y = (y - error[:, None]) * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(out_ptr + r * C + c, y.to(out_ptr.dtype.element_ty), mask=mask)


def layernorm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    launch: RowwiseLaunch | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Layer normalisation of `x`, or of `x + residual`, which is then returned too.

    Args:
        x: `[..., C]` fp16, bf16 or fp32, with one stride between rows.
        weight, bias: `[C]` contiguous.
        eps: added to the variance.
        residual: like x. The sum is normalised in fp32, before it is rounded.
        launch: overrides the launch table.

    Returns:
        `[..., C]` contiguous in the dtype of `x`; with a residual `(normalised, x + residual)`, both like this.

    Raises:
        ValueError: shapes, strides or dtypes that the kernel does not take, or gradients, which it lacks.
    """
    columns = x.shape[-1]
    if x.dtype not in DTYPES:
        raise ValueError(f"layernorm: x is {x.dtype}; the kernel takes float16, bfloat16 and float32")
    if not 0 < columns <= WIDEST:
        raise ValueError(f"layernorm: rows of {columns}; the kernel takes 1 to {WIDEST}")
    if weight.shape != (columns,) or bias.shape != (columns,) or weight.stride(0) != 1 or bias.stride(0) != 1:
        raise ValueError(f"layernorm: weight and bias need shape [{columns}], contiguous")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError("layernorm: residual needs the shape and the dtype of x")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias, residual)):
        raise ValueError("layernorm: the kernel has no gradients; use the torch backend for training")
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = None if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        rows, stride = x.numel() // columns, row_stride("layernorm: x", x)
        residual_stride = 0 if residual is None else row_stride("layernorm: residual", residual)
        launch = launch or choose(architecture.class_of(x.device), columns)
        with torch.cuda.device_of(x):
            _layernorm_kernel[(-(-rows // launch.block_rows),)](
                *(x, residual, weight, bias, out, total, rows, columns, eps, stride, residual_stride),
                BLOCK_R=launch.block_rows,
                BLOCK_C=launch.block_columns,
                num_warps=launch.warps,
                **OPTIONS,
            )
    return out if total is None else (out, total)
