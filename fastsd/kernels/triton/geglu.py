"""The gate of `geglu` on the GPU: bias, split, GELU and product in one pass (Shazeer 2020, equation 6)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastsd.kernels.launch import OPTIONS, architecture
from fastsd.kernels.launch.rowwise import RowwiseLaunch, row_stride
from fastsd.kernels.launch.rowwise import geglu as choose

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@triton.jit
def _geglu_kernel(
    y_ptr,  # [R, 2 * N]: value, gate
    bias_ptr,  # [2 * N] or None
    out_ptr,  # [R, N]
    R,
    N,
    stride_yr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # Rows in the first dimension of the grid, which is not limited to 65535 programs.
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    r, c, within = row.to(tl.int64)[:, None], column[None, :], (column < N)[None, :]
    mask = (row < R)[:, None] & within
    value = tl.load(y_ptr + r * stride_yr + c, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(y_ptr + r * stride_yr + (N + c), mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        value += tl.load(bias_ptr + c, mask=within, other=0.0).to(tl.float32)
        gate += tl.load(bias_ptr + N + c, mask=within, other=0.0).to(tl.float32)
    result = value * (0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)))
    tl.store(out_ptr + r * N + c, result.to(out_ptr.dtype.element_ty), mask=mask)


def geglu_gate(y: torch.Tensor, bias: torch.Tensor | None = None, launch: RowwiseLaunch | None = None) -> torch.Tensor:
    """`value * gelu(gate)` for (value, gate) the halves of `y + bias`, with the exact (erf) GELU.

    Args:
        y: `[..., 2 * N]` fp16, bf16 or fp32, the product that `fastsd.kernels.geglu` specifies; one stride between
            rows.
        bias: `[2 * N]` contiguous, or None if the product includes it.
        launch: overrides the launch table.

    Returns:
        `[..., N]` contiguous in the dtype of `y`.

    Raises:
        ValueError: shapes, strides or dtypes that the kernel does not take, or gradients, which it lacks.
    """
    columns = y.shape[-1] // 2
    if y.dtype not in DTYPES:
        raise ValueError(f"geglu: y is {y.dtype}; the kernel takes float16, bfloat16 and float32")
    if y.shape[-1] % 2 or not columns:
        raise ValueError(f"geglu: rows of {y.shape[-1]}; value and gate need an even number of columns")
    if bias is not None and (bias.shape != (2 * columns,) or bias.stride(0) != 1):
        raise ValueError(f"geglu: bias needs shape [{2 * columns}], contiguous")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (y, bias)):
        raise ValueError("geglu: the kernel has no gradients; use the torch backend for training")
    out = torch.empty(*y.shape[:-1], columns, dtype=y.dtype, device=y.device)
    if y.numel():
        rows = y.numel() // (2 * columns)
        launch = launch or choose(architecture.class_of(y.device), columns)
        with torch.cuda.device_of(y):
            _geglu_kernel[(-(-rows // launch.block_rows), -(-columns // launch.block_columns))](
                *(y, bias, out, rows, columns, row_stride("geglu: y", y)),
                BLOCK_R=launch.block_rows,
                BLOCK_N=launch.block_columns,
                num_warps=launch.warps,
                **OPTIONS,
            )
    return out
