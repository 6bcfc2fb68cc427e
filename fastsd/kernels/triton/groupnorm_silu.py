"""`groupnorm_silu` on the GPU: statistics, normalisation, SiLU and the reading of a skip connection in one op.

If the first-level cache holds all pixels of a program's channels, one launch does it all: the program reads them twice,
the second time from that cache. Larger maps go to `groupnorm_silu_split`, which occupies all multiprocessors.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl

from fastsd.kernels.launch import OPTIONS, architecture
from fastsd.kernels.launch.groupnorm_silu import GroupNormLaunch, choose, power_of_two
from fastsd.kernels.triton.groupnorm_silu_split import groupnorm_silu_split
from fastsd.kernels.triton.groupnorm_silu_tiles import group_moments, load_pivot, normalise

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@triton.jit
def _groupnorm_silu_kernel(
    x_ptr,  # [B, HW, C1]
    x2_ptr,  # [B, HW, C - C1] with PARTS 2
    add_ptr,  # [B or 1, C] or None
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    ahead_ptr,  # [C] or None
    out_ptr,  # [B, HW, C]
    sum_ptr,  # [B, HW, C] with ahead_ptr
    HW,
    C,
    C1,
    eps,
    stride_xb,
    stride_xp,
    stride_x2b,
    stride_x2p,
    stride_ab,
    CPG: tl.constexpr,  # channels per group
    G: tl.constexpr,  # groups per program
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
    PARTS: tl.constexpr,
    SILU: tl.constexpr,
):
    b, lane = tl.program_id(1).to(tl.int64), tl.arange(0, BLOCK_C)
    channel, within = tl.program_id(0) * (G * CPG) + lane, lane < G * CPG
    x_ptr += b * stride_xb
    x2_ptr += b * stride_x2b
    out_ptr += b * HW * C
    if add_ptr is not None:
        add_ptr += b * stride_ab
    if sum_ptr is not None:
        sum_ptr += b * HW * C
    # fmt: off
    pivot = load_pivot(x_ptr, x2_ptr, add_ptr, channel, within, C1, stride_xp, stride_x2p, CPG, PARTS)
    mean, m2 = group_moments(x_ptr, x2_ptr, add_ptr, pivot, 0, HW, channel, within, C1, stride_xp, stride_x2p,
                             CPG, BLOCK_P, BLOCK_C, BLOCK_G, PARTS)
    normalise(x_ptr, x2_ptr, add_ptr, weight_ptr, bias_ptr, ahead_ptr, out_ptr, sum_ptr, pivot, mean, m2, eps, 0, HW,
              channel, within, HW, C, C1, stride_xp, stride_x2p, CPG, BLOCK_P, BLOCK_C, BLOCK_G, PARTS, SILU)
    # fmt: on


def groupnorm_silu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    silu: bool = True,
    add: torch.Tensor | None = None,
    skip: torch.Tensor | None = None,
    ahead: torch.Tensor | None = None,
    launch: GroupNormLaunch | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`silu(group_norm(cat([x, skip], -1) + add))`; see `fastsd.kernels.groupnorm_silu` for the specification.

    Args:
        x: `[B, H, W, C1]` fp16, bf16 or fp32; adjacent channels, no gaps between the rows of pixels, any stride between
            pixels and between images.
        weight, bias: `[C]` contiguous, C = C1 (+ C2).
        groups: number of groups; divides C.
        eps: added to the variance.
        silu: apply x * sigmoid(x) afterwards.
        add: `[B or 1, C]`, added to every pixel before.
        skip: `[B, H, W, C2]` like x: further channels, read in place.
        ahead: `[C]` contiguous; with it, `cat([x, skip], -1) + add + ahead` is returned too.
        launch: overrides the launch table.

    Returns:
        `[B, H, W, C]` contiguous, in the dtype of `x`; with `ahead` a pair of those, the sum second. An
        image's result does not depend on the others in its batch.

    Raises:
        ValueError: shapes, strides or dtypes that the kernel does not take, or gradients, which it lacks.
    """
    batch, height, width, c1 = x.shape
    pixels, channels = height * width, c1 + (0 if skip is None else skip.shape[-1])
    _check(x, weight, bias, groups, add, skip, ahead, channels)
    out = torch.empty(batch, height, width, channels, dtype=x.dtype, device=x.device)
    total = None if ahead is None else torch.empty(out.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out if total is None else (out, total)
    if launch is None:
        launch = choose(architecture.class_of(x.device), pixels, channels, groups, x.element_size())
        if total is not None and not launch.split_pixels:  # with 16 warps Triton 3.6 spills the second result
            launch = replace(launch, warps=min(launch.warps, 8))
    x2 = x if skip is None else skip
    size = channels // groups
    add_stride = add.stride(0) if add is not None and len(add) > 1 else 0
    strides = (x.stride(0), _pixel_stride(x), x2.stride(0), _pixel_stride(x2), add_stride)
    tile = {
        "CPG": size,
        "G": launch.groups,
        "BLOCK_P": launch.block_p,
        "BLOCK_C": power_of_two(launch.groups * size),
        "BLOCK_G": power_of_two(launch.groups),
        "PARTS": 1 if skip is None else 2,
        "num_warps": launch.warps,
        **OPTIONS,
    }
    with torch.cuda.device_of(x):
        if launch.split_pixels:
            groupnorm_silu_split(x, x2, add, weight, bias, ahead, out, total, eps, silu, launch, strides, tile)
        else:
            _groupnorm_silu_kernel[(groups // launch.groups, batch)](
                *(x, x2, add, weight, bias, ahead, out, total, pixels, channels, c1, eps, *strides), SILU=silu, **tile
            )
    return out if total is None else (out, total)


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    add: torch.Tensor | None,
    skip: torch.Tensor | None,
    ahead: torch.Tensor | None,
    channels: int,
) -> None:
    if x.dtype not in DTYPES:
        raise ValueError(f"groupnorm_silu: x is {x.dtype}; the kernel takes float16, bfloat16 and float32")
    if skip is not None and (skip.shape[:3] != x.shape[:3] or skip.dtype != x.dtype):
        raise ValueError(f"groupnorm_silu: skip needs shape {[*x.shape[:3]]} + [C2] and the dtype of x")
    if groups < 1 or channels % groups:
        raise ValueError(f"groupnorm_silu: {groups} groups do not divide {channels} channels")
    if weight.shape != (channels,) or bias.shape != (channels,) or weight.stride(0) != 1 or bias.stride(0) != 1:
        raise ValueError(f"groupnorm_silu: weight and bias need shape [{channels}], contiguous")
    if ahead is not None and (ahead.shape != (channels,) or not ahead.is_contiguous()):
        raise ValueError(f"groupnorm_silu: ahead needs shape [{channels}], contiguous")
    if add is not None and add.shape not in ((len(x), channels), (1, channels)):
        raise ValueError(f"groupnorm_silu: add is {list(add.shape)}; it needs [{len(x)} or 1, {channels}]")
    if add is not None and channels > 1 and add.stride(1) != 1:
        raise ValueError("groupnorm_silu: add needs its channels next to each other")
    for name, part in (("x", x), ("skip", skip)):
        if part is not None and part.numel() and not _rows(part):
            raise ValueError(
                f"groupnorm_silu: {name} has strides {list(part.stride())}; it needs channels next to each other "
                "and rows of pixels without gaps between them"
            )
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias, add, skip, ahead)):
        raise ValueError("groupnorm_silu: the kernel has no gradients; use the torch backend for training")


def _pixel_stride(x: torch.Tensor) -> int:
    return x.stride(2) if x.shape[2] > 1 else x.stride(1)


def _rows(x: torch.Tensor) -> bool:
    """Whether all pixels of an image have one stride and channels stride 1."""
    _, height, width, channels = x.shape
    return (channels == 1 or x.stride(3) == 1) and (height == 1 or width == 1 or x.stride(1) == width * x.stride(2))
