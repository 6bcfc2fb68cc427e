"""What a convolution by cuDNN leaves to do, in one pass over its result: bias, residual, ReLU.

Of a large map the pass also takes the moments that the group norm after it needs (`fastsd.kernels.moments`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastsd.kernels import moments
from fastsd.kernels.launch import OPTIONS, architecture, groupnorm_silu
from fastsd.kernels.launch.groupnorm_silu import GroupNormLaunch, power_of_two
from fastsd.kernels.launch.rowwise import RowwiseLaunch, row_stride
from fastsd.kernels.launch.rowwise import add_bias_residual as choose
from fastsd.kernels.triton.groupnorm_silu_tiles import merge_lanes, update_lanes

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


@triton.jit
def _residual_moments_kernel(
    y_ptr,  # [B, HW, C], changed in place
    bias_ptr,  # [C] or None
    residual_ptr,  # [B, HW, C] or None
    moments_ptr,  # [B, 2, runs, groups] fp32: means, squared deviations summed
    HW,
    C,
    run,
    stride_rr,
    CPG: tl.constexpr,
    G: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    i, block, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    runs, groups = tl.num_programs(0), tl.num_programs(1) * G
    lane, g, row = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_P)
    channel, within = block * (G * CPG) + lane, lane < G * CPG
    start = i * run
    n = tl.minimum(run, HW - start)
    bias = tl.zeros([BLOCK_C], tl.float32)
    if bias_ptr is not None:
        bias += tl.load(bias_ptr + channel, mask=within, other=0.0).to(tl.float32)
    mean = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    count = 0.0
    for offset in range(0, n, BLOCK_P):
        pixel, live = b * HW + start + offset + row, offset + row < n
        mask = live[:, None] & within[None, :]
        pointers = y_ptr + pixel[:, None] * C + channel[None, :]
        y = tl.load(pointers, mask=mask, other=0.0).to(tl.float32) + bias[None, :]
        if residual_ptr is not None:
            others = residual_ptr + pixel[:, None] * stride_rr + channel[None, :]
            y += tl.load(others, mask=mask, other=0.0).to(tl.float32)
        rounded = y.to(y_ptr.dtype.element_ty)
        tl.store(pointers, rounded, mask=mask)
        count += 1.0
        mean, m2 = update_lanes(mean, m2, count, tl.where(within[None, :], rounded.to(tl.float32), 0.0), live)
    mean, m2 = merge_lanes(mean, m2, n, CPG, BLOCK_P, BLOCK_C, BLOCK_G)
    pointers = moments_ptr + (b * 2 * runs + i) * groups + block * G + g
    tl.store(pointers, mean, mask=g < G)
    tl.store(pointers + runs * groups, m2, mask=g < G)


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
        split = None if relu or launch is not None else split_of(y)
        if split is not None:
            return _with_moments(y, bias, residual, residual_stride, split)
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


def split_of(y: torch.Tensor) -> GroupNormLaunch | None:
    """The launch of the norm that may read the map `y` next, if that norm would need a launch for its moments.

    In 16 bits only: without a pivot, a mean is off by up to 2^-24 of itself for each of a few roundings. Values of 16
    bits that differ at all do so by 2^-11 of themselves or more, which bounds |mean| / deviation; fp32 has no such
    bound.
    """
    if y.ndim != 4 or y.element_size() != 2 or y.shape[3] % moments.GROUPS:
        return None
    _, height, width, channels = y.shape
    key = (height * width, channels, moments.GROUPS, y.element_size())
    launch = groupnorm_silu.choose(architecture.class_of(y.device), *key)
    return launch if launch.split_pixels else None


def _with_moments(
    y: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    residual_stride: int,
    launch: GroupNormLaunch,
) -> torch.Tensor:
    batch, height, width, channels = y.shape
    pixels, size, run = height * width, channels // moments.GROUPS, launch.split_pixels
    runs = -(-pixels // run)
    values = torch.empty(batch, 2, runs, moments.GROUPS, dtype=torch.float32, device=y.device)
    settings = groupnorm_silu.TABLE[architecture.class_of(y.device)]
    with torch.cuda.device_of(y):
        _residual_moments_kernel[(runs, moments.GROUPS // launch.groups, batch)](
            *(y, bias, residual, values, pixels, channels, run, residual_stride),
            CPG=size,
            G=launch.groups,
            BLOCK_P=launch.block_p,
            BLOCK_C=power_of_two(launch.groups * size),
            BLOCK_G=power_of_two(launch.groups),
            num_warps=settings.residual_warps,
            **OPTIONS,
        )
    moments.note(y, moments.MapMoments(values, run))
    return y
