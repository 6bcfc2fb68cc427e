"""`layernorm` on the GPU, with the addition of biases in the same pass (Ba et al. 2016, equation 4)."""

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
def _add_vector(total, vector_ptr, column, within):
    return total + tl.load(vector_ptr + column, mask=within, other=0.0).to(tl.float32)


@triton.jit
def _layernorm_kernel(
    x_ptr,  # [R, C]
    first_ptr,  # [C] or None: vectors whose sum is added to x ahead, or owed
    second_ptr,
    third_ptr,
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    out_ptr,  # [R, C]
    sum_ptr,  # [R, C], or None where the vectors are owed
    R,
    C,
    eps,
    stride_xr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row, column = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C)
    r, c, within = row.to(tl.int64)[:, None], column[None, :], column < C
    mask = (row < R)[:, None] & within[None, :]
    y = tl.load(x_ptr + r * stride_xr + c, mask=mask, other=0.0).to(tl.float32)
    if first_ptr is not None:
        vectors = _add_vector(tl.zeros([BLOCK_C], tl.float32), first_ptr, column, within)
        if second_ptr is not None:
            vectors = _add_vector(vectors, second_ptr, column, within)
        if third_ptr is not None:
            vectors = _add_vector(vectors, third_ptr, column, within)
        if sum_ptr is not None:
            tl.store(sum_ptr + r * C + c, (y + vectors[None, :]).to(sum_ptr.dtype.element_ty), mask=mask)
        else:
            y -= vectors[None, :]
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
    ahead: tuple[torch.Tensor, ...] = (),
    owed: tuple[torch.Tensor, ...] = (),
    launch: RowwiseLaunch | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Layer normalisation of `x - owed`, and `x + ahead` if that is not empty.

    Args:
        x: `[..., C]` fp16, bf16 or fp32, with one stride between rows.
        weight, bias: `[C]` contiguous.
        eps: added to the variance.
        ahead, owed: up to three vectors `[C]` each, contiguous; one of both is empty. Their sum is taken in fp32.
        launch: overrides the launch table.

    Returns:
        `[..., C]` contiguous in the dtype of `x`; with `ahead` `(normalised, x + ahead)`, both like this.

    Raises:
        ValueError: shapes, strides or dtypes that the kernel does not take, or gradients, which it lacks.
    """
    columns = x.shape[-1]
    _check(x, weight, bias, ahead, owed)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device) if ahead else None
    if x.numel():
        rows, stride = x.numel() // columns, row_stride("layernorm: x", x)
        launch = launch or choose(architecture.class_of(x.device), columns)
        vectors = [*ahead, *owed, None, None, None][:3]
        with torch.cuda.device_of(x):
            _layernorm_kernel[(-(-rows // launch.block_rows),)](
                *(x, *vectors, weight, bias, out, total, rows, columns, eps, stride),
                BLOCK_R=launch.block_rows,
                BLOCK_C=launch.block_columns,
                num_warps=launch.warps,
                **OPTIONS,
            )
    return out if total is None else (out, total)


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    ahead: tuple[torch.Tensor, ...],
    owed: tuple[torch.Tensor, ...],
) -> None:
    columns = x.shape[-1]
    if x.dtype not in DTYPES:
        raise ValueError(f"layernorm: x is {x.dtype}; the kernel takes float16, bfloat16 and float32")
    if not 0 < columns <= WIDEST:
        raise ValueError(f"layernorm: rows of {columns}; the kernel takes 1 to {WIDEST}")
    if weight.shape != (columns,) or bias.shape != (columns,) or weight.stride(0) != 1 or bias.stride(0) != 1:
        raise ValueError(f"layernorm: weight and bias need shape [{columns}], contiguous")
    if (ahead and owed) or len(ahead) > 3 or len(owed) > 3:
        raise ValueError("layernorm: ahead or owed needs up to three vectors, the other none")
    if any(vector.shape != (columns,) or not vector.is_contiguous() for vector in (*ahead, *owed)):
        raise ValueError(f"layernorm: vectors ahead and owed need shape [{columns}], contiguous")
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, bias, *ahead, *owed)):
        raise ValueError("layernorm: the kernel has no gradients; use the torch backend for training")
