"""`groupnorm_silu` of maps that exceed the first-level cache: one launch for the moments, one that normalises.

Each program of the first launch takes the moments of a run of pixels, a split; the programs of the second merge them.
Many splits are merged by a launch in between, because every program of the last launch would read them all. The first
launch is left out where the op that wrote the map took its moments (`fastsd.kernels.moments`).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fastsd.kernels.launch import OPTIONS
from fastsd.kernels.launch.groupnorm_silu import GroupNormLaunch, power_of_two
from fastsd.kernels.moments import GROUPS, MapMoments, of
from fastsd.kernels.triton.groupnorm_silu_tiles import group_moments, load_pivot, normalise

MERGED = 64  # the most runs of given moments that the last launch merges itself


@triton.jit
def _groupnorm_moments_kernel(
    x_ptr,  # [B, HW, C1]
    x2_ptr,  # [B, HW, C - C1] with PARTS 2
    add_ptr,  # [B or 1, C] or None
    moments_ptr,  # [B, 2, splits, groups] fp32: mean minus the pivot, squared deviations summed
    HW,
    C1,
    split_pixels,
    stride_xb,
    stride_xp,
    stride_x2b,
    stride_x2p,
    stride_ab,
    CPG: tl.constexpr,
    G: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
    PARTS: tl.constexpr,
):
    split, block, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    splits, groups = tl.num_programs(0), tl.num_programs(1) * G
    lane, g = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_G)
    channel, within = block * (G * CPG) + lane, lane < G * CPG
    start = split * split_pixels
    x_ptr += b * stride_xb
    x2_ptr += b * stride_x2b
    if add_ptr is not None:
        add_ptr += b * stride_ab
    # fmt: off
    pivot = load_pivot(x_ptr, x2_ptr, add_ptr, channel, within, C1, stride_xp, stride_x2p, CPG, PARTS)
    mean, m2 = group_moments(x_ptr, x2_ptr, add_ptr, pivot, start, tl.minimum(split_pixels, HW - start), channel,
                             within, C1, stride_xp, stride_x2p, CPG, BLOCK_P, BLOCK_C, BLOCK_G, PARTS)
    # fmt: on
    pointers = moments_ptr + (b * 2 * splits + split) * groups + block * G + g
    tl.store(pointers, mean, mask=g < G)
    tl.store(pointers + splits * groups, m2, mask=g < G)


@triton.jit
def _merge_splits(moments_ptr, group, mask, splits, groups, split_pixels, HW, CPG: tl.constexpr, BLOCK_S: tl.constexpr):
    """The moments of `group` over all pixels, from one image's `[2, splits, groups]`."""
    s = tl.arange(0, BLOCK_S)
    n = tl.maximum(tl.minimum(split_pixels, HW - s * split_pixels), 0).to(tl.float32)[:, None]
    pointers = moments_ptr + s[:, None] * groups + group[None, :]
    mask = (s < splits)[:, None] & mask[None, :]
    first = tl.load(moments_ptr + group, mask=group < groups, other=0.0)
    means = tl.load(pointers, mask=mask, other=0.0) - first[None, :]  # exact for means near the first one
    m2 = tl.load(pointers + splits * groups, mask=mask, other=0.0)
    mean = tl.sum(tl.where(mask, means * n, 0.0), 0) / HW
    centred = tl.where(mask, means - mean[None, :], 0.0)
    return first + mean, tl.sum(m2 + n * CPG * centred * centred, 0)


@triton.jit
def _groupnorm_merge_kernel(
    moments_ptr,  # [B, 2, splits, groups]
    merged_ptr,  # [B, 2, 1, groups]
    HW,
    splits,
    split_pixels,
    groups,
    CPG: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    group = tl.program_id(0) + tl.arange(0, 1)
    mean, m2 = _merge_splits(
        moments_ptr + b * 2 * splits * groups, group, group < groups, splits, groups, split_pixels, HW, CPG, BLOCK_S
    )
    tl.store(merged_ptr + b * 2 * groups + group, mean)
    tl.store(merged_ptr + b * 2 * groups + groups + group, m2)


@triton.jit
def _groupnorm_apply_kernel(
    x_ptr,  # [B, HW, C1]
    x2_ptr,  # [B, HW, C - C1] with PARTS 2
    add_ptr,  # [B or 1, C] or None
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    ahead_ptr,  # [C] or None
    moments_ptr,  # [B, 2, splits, groups]
    out_ptr,  # [B, HW, C]
    sum_ptr,  # [B, HW, C] with ahead_ptr
    HW,
    C,
    C1,
    splits,
    split_pixels,
    apply_pixels,
    eps,
    stride_xb,
    stride_xp,
    stride_x2b,
    stride_x2p,
    stride_ab,
    CPG: tl.constexpr,
    G: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PARTS: tl.constexpr,
    SILU: tl.constexpr,
    GIVEN: tl.constexpr,  # the moments are those of the op that wrote x, without a pivot
):
    block, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    groups = tl.num_programs(1) * G
    lane, g = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_G)
    channel, within = block * (G * CPG) + lane, lane < G * CPG
    start = tl.program_id(0) * apply_pixels
    x_ptr += b * stride_xb
    x2_ptr += b * stride_x2b
    moments_ptr += b * 2 * splits * groups
    out_ptr += b * HW * C
    if add_ptr is not None:
        add_ptr += b * stride_ab
    if sum_ptr is not None:
        sum_ptr += b * HW * C
    # fmt: off
    if GIVEN:
        pivot = tl.zeros([1, BLOCK_C], tl.float32)
    else:
        pivot = load_pivot(x_ptr, x2_ptr, add_ptr, channel, within, C1, stride_xp, stride_x2p, CPG, PARTS)
    mean, m2 = _merge_splits(moments_ptr, block * G + g, g < G, splits, groups, split_pixels, HW, CPG, BLOCK_S)
    normalise(x_ptr, x2_ptr, add_ptr, weight_ptr, bias_ptr, ahead_ptr, out_ptr, sum_ptr, pivot, mean, m2, eps, start,
              tl.minimum(start + apply_pixels, HW), channel, within, HW, C, C1, stride_xp, stride_x2p,
              CPG, BLOCK_P, BLOCK_C, BLOCK_G, PARTS, SILU)
    # fmt: on


def groupnorm_silu_split(
    x: torch.Tensor,
    x2: torch.Tensor,
    add: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    ahead: torch.Tensor | None,
    out: torch.Tensor,
    total: torch.Tensor | None,
    eps: float,
    silu: bool,
    launch: GroupNormLaunch,
    strides: tuple[int, ...],
    tile: dict[str, Any],
) -> None:
    """Fill `out` and `total` `[B, H, W, C]`; the arguments are those of `groupnorm_silu`, which has checked them.

    strides: of x, x2 and add, in the order of the kernels' arguments. tile: the constants that all kernels share.
    """
    batch, height, width, channels = out.shape
    pixels, groups = height * width, channels // tile["CPG"]
    blocks = groups // launch.groups
    given = given_moments(x, x2, add, groups)
    splits, split_pixels, merge = -(-pixels // launch.split_pixels), launch.split_pixels, launch.merge
    if given is not None:
        moments, split_pixels = given.values, given.run
        splits = moments.shape[2]
        merge = splits > MERGED
    else:
        moments = torch.empty(batch, 2, splits, groups, dtype=torch.float32, device=x.device)
        _groupnorm_moments_kernel[(splits, blocks, batch)](
            x, x2, add, moments, pixels, x.shape[-1], split_pixels, *strides, **tile
        )
    if merge:
        merged = torch.empty(batch, 2, 1, groups, dtype=torch.float32, device=x.device)
        _groupnorm_merge_kernel[(groups, batch)](
            *(moments, merged, pixels, splits, split_pixels, groups),
            CPG=tile["CPG"],
            BLOCK_S=power_of_two(splits),
            **OPTIONS,
        )
        moments, splits, split_pixels = merged, 1, pixels
    _groupnorm_apply_kernel[(-(-pixels // launch.apply_pixels), blocks, batch)](
        *(x, x2, add, weight, bias, ahead, moments, out, total, pixels, channels, x.shape[-1]),
        *(splits, split_pixels, launch.apply_pixels, eps, *strides),
        BLOCK_S=power_of_two(splits),
        SILU=silu,
        GIVEN=given is not None,
        **tile,
    )


def given_moments(x: torch.Tensor, x2: torch.Tensor, add: torch.Tensor | None, groups: int) -> MapMoments | None:
    """The moments of the map that is normalised, if the op that wrote it took them."""
    return of(x) if x2 is x and add is None and groups == GROUPS else None
