"""What the kernels of `groupnorm_silu` share: they read a tile, take its moments, and write it normalised.

A tile is `[pixels, channels of a few whole groups]`, so that reads are coalesced even if a group has few channels (10
in SD1.5). Moments are centred, first per channel and then merged by Chan's formula (Chan et al. 1983, equations 2.1):
E[x^2] - E[x]^2 cancels when |mean| >> std, and a channel's mean may be far from its group's.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_sum(x_ptr, x2_ptr, add_ptr, pixel, live, channel, within, C1, stride_xp, stride_x2p, PARTS: tl.constexpr):
    """The tile `pixel` x `channel` of cat([x, x2]) + add, in fp32. cat([x, x2]) reads as 0 outside the masks."""
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
def load_pivot(
    x_ptr, x2_ptr, add_ptr, channel, within, C1, stride_xp, stride_x2p, CPG: tl.constexpr, PARTS: tl.constexpr
):
    """The first pixel's value `[1, BLOCK_C]` in each group's first channel.

    It is subtracted before the moments are computed. The difference is exact for values near the pivot, so the moments
    are rounded relative to the spread. Without it, a mean of 30 in fp32 is off by 1e-3 of a standard deviation of 1e-3.
    """
    zero = tl.arange(0, 1)
    first = channel // CPG * CPG
    return load_sum(x_ptr, x2_ptr, add_ptr, zero, zero == 0, first, within, C1, stride_xp, stride_x2p, PARTS)


@triton.jit
def merge_channels(mean, m2, n, CPG: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr):
    """The moments of groups `[BLOCK_G]` from those of channels `[BLOCK_C]` over n pixels."""
    member = tl.arange(0, BLOCK_C)[None, :] // CPG == tl.arange(0, BLOCK_G)[:, None]
    group_mean = tl.sum(tl.where(member, mean[None, :], 0.0), 1) / CPG
    centred = tl.where(member, mean[None, :] - group_mean[:, None], 0.0)
    group_m2 = tl.sum(tl.where(member, m2[None, :], 0.0) + n * centred * centred, 1)
    return group_mean, group_m2


@triton.jit
def update_lanes(mean, m2, count, y, live):
    """Mean and squared deviations `[BLOCK_P, BLOCK_C]` of each lane after its value of `y`, the `count`-th.

    Every lane of the tile runs Welford's update (1962), so that threads communicate once, after the loop.
    """
    delta = tl.where(live[:, None], y - mean, 0.0)
    mean += delta * (1.0 / count)
    return mean, m2 + delta * (y - mean)


@triton.jit
def merge_lanes(mean, m2, n, CPG: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr):
    """The moments of groups `[BLOCK_G]` over n pixels from those of the lanes."""
    counts = ((n - tl.arange(0, BLOCK_P) + BLOCK_P - 1) // BLOCK_P).to(tl.float32)[:, None]  # pixels per lane
    channel_mean = tl.sum(mean * counts, 0) / n
    centred = mean - channel_mean[None, :]
    channel_m2 = tl.sum(m2 + counts * centred * centred, 0)
    return merge_channels(channel_mean, channel_m2, n, CPG, BLOCK_C, BLOCK_G)


@triton.jit
def group_moments(
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
    """Moments of groups `[BLOCK_G]` over the n pixels from `start`: mean minus the pivot, squared deviations summed."""
    row = tl.arange(0, BLOCK_P)
    mean = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    count = 0.0
    for offset in range(0, n, BLOCK_P):
        pixel, live = start + offset + row, offset + row < n
        y = load_sum(x_ptr, x2_ptr, add_ptr, pixel, live, channel, within, C1, stride_xp, stride_x2p, PARTS) - pivot
        count += 1.0
        mean, m2 = update_lanes(mean, m2, count, y, live)
    return merge_lanes(mean, m2, n, CPG, BLOCK_P, BLOCK_C, BLOCK_G)


@triton.jit
def normalise(
    x_ptr,
    x2_ptr,
    add_ptr,
    weight_ptr,
    bias_ptr,
    ahead_ptr,
    out_ptr,
    sum_ptr,
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
    """Write silu((x + add - mean) * scale + shift) for the pixels from `start` to `end`; with `sum_ptr` also the sum
    x + add + ahead.

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
        total = load_sum(x_ptr, x2_ptr, add_ptr, pixel, live, channel, within, C1, stride_xp, stride_x2p, PARTS)
        y = ((total - pivot) - mean[None, :]) * scale[None, :] + shift[None, :]
        if SILU:
            y = y / (1.0 + tl.exp(-y))
        offsets, mask = pixel.to(tl.int64)[:, None] * C + channel[None, :], live[:, None] & within[None, :]
        tl.store(out_ptr + offsets, y.to(out_ptr.dtype.element_ty), mask=mask)
        if sum_ptr is not None:
            ahead = tl.load(ahead_ptr + channel, mask=within, other=0.0).to(tl.float32)
            tl.store(sum_ptr + offsets, (total + ahead[None, :]).to(sum_ptr.dtype.element_ty), mask=mask)
