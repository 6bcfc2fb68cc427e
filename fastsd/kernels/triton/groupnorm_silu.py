"""`groupnorm_silu` on the GPU: statistics, normalisation, SiLU and the reading of a skip-concatenation in one place.

A program's tile is `[pixels, channels of a few whole groups]`, so that reads are coalesced however few channels a
group has (10 in SD1.5). Moments are centred, first by channel and then merged by Chan's formula (Chan et al. 1983,
equations 2.1): E[x^2] - E[x]^2 cancels when |mean| >> std, and a channel's mean may be far from its group's.

Where all pixels of a program's channels fit the first-level cache, one launch does it all, and its second reading is
served from there. Else `_groupnorm_moments_kernel` sums runs of pixels, on as many processors as there are, and
`_groupnorm_apply_kernel` merges the runs and normalises.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastsd.kernels.launch import OPTIONS, architecture
from fastsd.kernels.launch.groupnorm_silu import GroupNormLaunch, choose, power_of_two

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@triton.jit
def _load(x_ptr, x2_ptr, add_ptr, pixel, live, channel, within, C1, stride_xp, stride_x2p, PARTS: tl.constexpr):
    """x + add at `pixel` x `channel` in fp32, of x and x2 side by side in the channels; x is 0 outside the masks."""
    p, c = pixel.to(tl.int64)[:, None], channel[None, :]
    pointers = x_ptr + p * stride_xp + c
    if PARTS == 2:
        left = c < C1  # of columns: an address in each part for each element would take more registers
        pointers = tl.where(left, x_ptr + c, x2_ptr + (c - C1)) + p * tl.where(left, stride_xp, stride_x2p)
    y = tl.load(pointers, mask=live[:, None] & within[None, :], other=0.0).to(tl.float32)
    if add_ptr is not None:
        y += tl.load(add_ptr + c, mask=within[None, :], other=0.0).to(tl.float32)
    return y


@triton.jit
def _load_pivot(
    x_ptr, x2_ptr, add_ptr, channel, within, C1, stride_xp, stride_x2p, CPG: tl.constexpr, PARTS: tl.constexpr
):
    """x + add `[1, BLOCK_C]` at each group's first channel of the first pixel.

    Statistics of what is left after its subtraction, which is exact near it, are rounded on the scale of the spread.
    A mean of 30 in fp32 would be off by 1e-3 of a standard deviation of 1e-3.
    """
    zero = tl.arange(0, 1)
    first = channel // CPG * CPG
    return _load(x_ptr, x2_ptr, add_ptr, zero, zero == 0, first, within, C1, stride_xp, stride_x2p, PARTS)


@triton.jit
def _merge_channels(mean, m2, n, CPG: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr):
    """Moments of channels over n pixels `[BLOCK_C]` to moments of groups `[BLOCK_G]`."""
    member = tl.arange(0, BLOCK_C)[None, :] // CPG == tl.arange(0, BLOCK_G)[:, None]
    group_mean = tl.sum(tl.where(member, mean[None, :], 0.0), 1) / CPG
    centred = tl.where(member, mean[None, :] - group_mean[:, None], 0.0)
    group_m2 = tl.sum(tl.where(member, m2[None, :], 0.0) + n * centred * centred, 1)
    return group_mean, group_m2


@triton.jit
def _moments(
    x_ptr,
    x2_ptr,
    add_ptr,
    pivot,
    start,
    n,
    channel,
    within,
    C1,
    stride_xp,
    stride_x2p,
    CPG: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Mean less the pivot and sum of squares about it, of groups `[BLOCK_G]` over the n pixels from `start`.

    Welford's update (1962) in every lane of the tile, so that threads meet once, after the loop.
    """
    row = tl.arange(0, BLOCK_P)
    mean = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    count = 0.0
    for offset in range(0, n, BLOCK_P):
        pixel, live = start + offset + row, offset + row < n
        y = _load(x_ptr, x2_ptr, add_ptr, pixel, live, channel, within, C1, stride_xp, stride_x2p, PARTS) - pivot
        count += 1.0
        delta = tl.where(live[:, None], y - mean, 0.0)
        mean += delta * (1.0 / count)
        m2 += delta * (y - mean)
    counts = ((n - row + BLOCK_P - 1) // BLOCK_P).to(tl.float32)[:, None]  # pixels that a lane has seen
    channel_mean = tl.sum(mean * counts, 0) / n
    centred = mean - channel_mean[None, :]
    channel_m2 = tl.sum(m2 + counts * centred * centred, 0)
    return _merge_channels(channel_mean, channel_m2, n, CPG, BLOCK_C, BLOCK_G)


@triton.jit
def _normalise(
    x_ptr,
    x2_ptr,
    add_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    pivot,
    group_mean,
    group_m2,
    eps,
    start,
    end,
    channel,
    within,
    HW,
    C,
    C1,
    stride_xp,
    stride_x2p,
    CPG: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
    PARTS: tl.constexpr,
    SILU: tl.constexpr,
):
    """Write silu((x + add - mean) * scale + shift) of the pixels from `start` to `end`.

    Not (x + add) * scale + (shift - mean * scale): that cancels at large means.
    """
    member = tl.arange(0, BLOCK_C)[None, :] // CPG == tl.arange(0, BLOCK_G)[:, None]
    rstd = 1.0 / tl.sqrt_rn(group_m2 / HW / CPG + eps)
    scale = tl.sum(tl.where(member, rstd[:, None], 0.0), 0)
    mean = tl.sum(tl.where(member, group_mean[:, None], 0.0), 0)
    scale *= tl.load(weight_ptr + channel, mask=within, other=0.0).to(tl.float32)
    shift = tl.load(bias_ptr + channel, mask=within, other=0.0).to(tl.float32)
    for first in range(start, end, BLOCK_P):
        pixel = first + tl.arange(0, BLOCK_P)
        live = pixel < end
        y = _load(x_ptr, x2_ptr, add_ptr, pixel, live, channel, within, C1, stride_xp, stride_x2p, PARTS) - pivot
        y = (y - mean[None, :]) * scale[None, :] + shift[None, :]
        if SILU:
            y = y / (1.0 + tl.exp(-y))
        pointers = out_ptr + pixel.to(tl.int64)[:, None] * C + channel[None, :]
        tl.store(pointers, y.to(out_ptr.dtype.element_ty), mask=live[:, None] & within[None, :])


@triton.jit
def _groupnorm_silu_kernel(
    x_ptr,  # [B, HW, C1]
    x2_ptr,  # [B, HW, C - C1] with PARTS 2
    add_ptr,  # [B or 1, C] or None
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    out_ptr,  # [B, HW, C]
    HW,
    C,
    C1,
    eps,
    stride_xb,
    stride_xp,
    stride_x2b,
    stride_x2p,
    stride_ab,
    CPG: tl.constexpr,  # channels of a group
    G: tl.constexpr,  # groups of a program
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
    if add_ptr is not None:
        add_ptr += b * stride_ab
    # fmt: off
    pivot = _load_pivot(x_ptr, x2_ptr, add_ptr, channel, within, C1, stride_xp, stride_x2p, CPG, PARTS)
    mean, m2 = _moments(x_ptr, x2_ptr, add_ptr, pivot, 0, HW, channel, within, C1, stride_xp, stride_x2p,
                        CPG, BLOCK_P, BLOCK_C, BLOCK_G, PARTS)
    _normalise(x_ptr, x2_ptr, add_ptr, weight_ptr, bias_ptr, out_ptr + b * HW * C, pivot, mean, m2, eps, 0, HW,
               channel, within, HW, C, C1, stride_xp, stride_x2p, CPG, BLOCK_P, BLOCK_C, BLOCK_G, PARTS, SILU)
    # fmt: on


@triton.jit
def _groupnorm_moments_kernel(
    x_ptr,  # [B, HW, C1]
    x2_ptr,  # [B, HW, C - C1] with PARTS 2
    add_ptr,  # [B or 1, C] or None
    moments_ptr,  # [B, 2, splits, groups] fp32: mean less the pivot, sum of squares about it
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
    pivot = _load_pivot(x_ptr, x2_ptr, add_ptr, channel, within, C1, stride_xp, stride_x2p, CPG, PARTS)
    mean, m2 = _moments(x_ptr, x2_ptr, add_ptr, pivot, start, tl.minimum(split_pixels, HW - start), channel, within,
                        C1, stride_xp, stride_x2p, CPG, BLOCK_P, BLOCK_C, BLOCK_G, PARTS)
    # fmt: on
    pointers = moments_ptr + (b * 2 * splits + split) * groups + block * G + g
    tl.store(pointers, mean, mask=g < G)
    tl.store(pointers + splits * groups, m2, mask=g < G)


@triton.jit
def _merge_splits(moments_ptr, group, mask, splits, groups, split_pixels, HW, CPG: tl.constexpr, BLOCK_S: tl.constexpr):
    """Moments of `group` over all pixels, from one image's `[2, splits, groups]`."""
    s = tl.arange(0, BLOCK_S)
    n = tl.maximum(tl.minimum(split_pixels, HW - s * split_pixels), 0).to(tl.float32)[:, None]
    pointers = moments_ptr + s[:, None] * groups + group[None, :]
    mask = (s < splits)[:, None] & mask[None, :]
    means = tl.load(pointers, mask=mask, other=0.0)
    m2 = tl.load(pointers + splits * groups, mask=mask, other=0.0)
    mean = tl.sum(means * n, 0) / HW
    centred = tl.where(mask, means - mean[None, :], 0.0)
    return mean, tl.sum(m2 + n * CPG * centred * centred, 0)


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
    moments_ptr,  # [B, 2, splits, groups]
    out_ptr,  # [B, HW, C]
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
):
    block, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    groups = tl.num_programs(1) * G
    lane, g = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_G)
    channel, within = block * (G * CPG) + lane, lane < G * CPG
    start = tl.program_id(0) * apply_pixels
    x_ptr += b * stride_xb
    x2_ptr += b * stride_x2b
    moments_ptr += b * 2 * splits * groups
    if add_ptr is not None:
        add_ptr += b * stride_ab
    # fmt: off
    pivot = _load_pivot(x_ptr, x2_ptr, add_ptr, channel, within, C1, stride_xp, stride_x2p, CPG, PARTS)
    mean, m2 = _merge_splits(moments_ptr, block * G + g, g < G, splits, groups, split_pixels, HW, CPG, BLOCK_S)
    _normalise(x_ptr, x2_ptr, add_ptr, weight_ptr, bias_ptr, out_ptr + b * HW * C, pivot, mean, m2, eps,
               start, tl.minimum(start + apply_pixels, HW), channel, within, HW, C, C1, stride_xp, stride_x2p,
               CPG, BLOCK_P, BLOCK_C, BLOCK_G, PARTS, SILU)
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
    launch: GroupNormLaunch | None = None,
) -> torch.Tensor:
    """`silu(group_norm(cat([x, skip], -1) + add))`; see `fastsd.kernels.groupnorm_silu` for the specification.

    Args:
        x: `[B, H, W, C1]` fp16, bf16 or fp32; channels next to each other and rows of pixels without gaps between
            them, any stride between pixels and between images.
        weight, bias: `[C]` contiguous, C = C1 (+ C2).
        groups: number of groups; divides C.
        eps: added to the variance.
        silu: apply x * sigmoid(x) afterwards.
        add: `[B or 1, C]`, added to every pixel first.
        skip: `[B, H, W, C2]` like x: further channels, read from where they are.
        launch: how to launch it; None takes the table's.

    Returns:
        `[B, H, W, C]` contiguous, in the dtype of `x`. An image's result does not depend on the others in its batch.

    Raises:
        ValueError: shapes, strides or dtypes that the kernel does not take, or gradients, which it has not.
    """
    batch, height, width, c1 = x.shape
    pixels, channels = height * width, c1 + (0 if skip is None else skip.shape[-1])
    _check(x, weight, bias, groups, add, skip, channels)
    out = torch.empty(batch, height, width, channels, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    launch = launch or choose(architecture.class_of(x.device), pixels, channels, groups, x.element_size())
    other = x if skip is None else skip
    size = channels // groups
    add_stride = add.stride(0) if add is not None and len(add) > 1 else 0
    strides = (x.stride(0), _pixel_stride(x), other.stride(0), _pixel_stride(other), add_stride)
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
    blocks = groups // launch.groups
    with torch.cuda.device_of(x):
        if not launch.split_pixels:
            _groupnorm_silu_kernel[(blocks, batch)](
                x, other, add, weight, bias, out, pixels, channels, c1, eps, *strides, SILU=silu, **tile
            )
            return out
        splits, split_pixels = -(-pixels // launch.split_pixels), launch.split_pixels
        moments = torch.empty(batch, 2, splits, groups, dtype=torch.float32, device=x.device)
        _groupnorm_moments_kernel[(splits, blocks, batch)](
            x, other, add, moments, pixels, c1, split_pixels, *strides, **tile
        )
        if launch.merge:
            merged = torch.empty(batch, 2, 1, groups, dtype=torch.float32, device=x.device)
            _groupnorm_merge_kernel[(groups, batch)](
                moments, merged, pixels, splits, split_pixels, groups, CPG=size, BLOCK_S=power_of_two(splits), **OPTIONS
            )
            moments, splits, split_pixels = merged, 1, pixels
        _groupnorm_apply_kernel[(-(-pixels // launch.apply_pixels), blocks, batch)](
            *(x, other, add, weight, bias, moments, out, pixels, channels, c1),
            *(splits, split_pixels, launch.apply_pixels, eps, *strides),
            BLOCK_S=power_of_two(splits),
            SILU=silu,
            **tile,
        )
    return out


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    add: torch.Tensor | None,
    skip: torch.Tensor | None,
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
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias, add, skip)):
        raise ValueError("groupnorm_silu: the kernel has no gradients; use the torch backend for training")


def _pixel_stride(x: torch.Tensor) -> int:
    return x.stride(2) if x.shape[2] > 1 else x.stride(1)


def _rows(x: torch.Tensor) -> bool:
    """Whether all pixels of an image have one stride and channels stride 1."""
    _, height, width, channels = x.shape
    return (channels == 1 or x.stride(3) == 1) and (height == 1 or width == 1 or x.stride(1) == width * x.stride(2))
