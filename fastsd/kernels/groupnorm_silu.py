"""Group normalisation over channels-last maps, with SiLU (Wu and He 2018, equations 1 to 3 and 6)."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from fastsd.kernels import candidates, dispatch
from fastsd.kernels.candidates import GpuOp, OpCandidate
from fastsd.kernels.cpu import choices
from fastsd.kernels.launch import architecture, variants
from fastsd.kernels.launch.groupnorm_silu import GroupNormLaunch
from fastsd.kernels.linear import activate_by_image, undivided

# The CPU path.
TERMS = 128  # of one fp32 sum
PIXELS = 1024  # of one sum in PyTorch's norm; with more, few maps have a mean as small as `_largest_mean`
WIDTH = 4096  # sums in parallel, which stay in the first cache


def groupnorm_silu_ref(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    silu: bool = True,
    add: torch.Tensor | None = None,
    skip: torch.Tensor | None = None,
    ahead: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The specification of `groupnorm_silu`: two-pass statistics in fp32 (E[x^2] - E[x]^2 cancels at large means)."""
    if skip is not None:
        x = torch.cat([x, skip], dim=-1)
    batch, height, width, channels = x.shape
    total = dispatch.widen(x)
    if add is not None:
        total = total + add[:, None, None, :]
    y = total.reshape(batch, height * width, groups, -1).transpose(1, 2).flatten(2)  # one row for each group
    y = y - y.mean(-1, keepdim=True)
    y = y * (y.square().mean(-1, keepdim=True) + eps).rsqrt()
    y = y.unflatten(2, (height * width, channels // groups)).transpose(1, 2).reshape(x.shape) * weight + bias
    y = (y * torch.sigmoid(y) if silu else y).to(x.dtype)
    return y if ahead is None else (y, (total + ahead).to(x.dtype))


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
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`silu(group_norm(cat([x, skip]) + add))`, in the channels-last layout of convolutions and attention.

    Args:
        x: `[B, H, W, C1]`.
        weight, bias: `[C]`, C = C1 or, with `skip`, C1 + C2.
        groups: number of groups; divides C.
        eps: added to the variance.
        silu: apply x * sigmoid(x) afterwards.
        add: `[B or 1, C]`, added to every pixel first (the time embedding of a residual block).
        skip: `[B, H, W, C2]`, further channels (a skip connection), which the kernel reads in place.
        ahead: `[C]`; with it, `cat([x, skip]) + add + ahead` is returned too, a new tensor. It is the bias of a later
            product, which can then be added in place (`fastsd.kernels.add_product`).

    Returns:
        `[B, H, W, C]` in the dtype of `x`; with `ahead` a pair of those, the sum second.

    Raises:
        ValueError: `groups` does not divide C.
    """
    channels = x.shape[-1] + (0 if skip is None else skip.shape[-1])
    if channels % groups:
        raise ValueError(f"groupnorm_silu: {groups} groups do not divide {channels} channels")
    backend = dispatch.backend(x, weight, bias, add, skip, ahead, op="groupnorm_silu")
    if backend == "reference":
        return groupnorm_silu_ref(x, weight, bias, groups, eps, silu, add, skip, ahead)
    if backend == "triton":
        return candidates.run(OP, x, weight, bias, groups, eps, silu, add, skip, ahead)
    if backend == "onednn" and ahead is None:
        x = x if skip is None else torch.cat([x, skip], dim=-1)
        return _groupnorm_silu_cpu(x, _Norm(weight, bias, groups, eps, silu), add)
    return _by_torch(x, weight, bias, groups, eps, silu, add, skip, ahead)


def _by_triton(*args: Any, launch: GroupNormLaunch | None = None) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    from fastsd.kernels.triton import groupnorm_silu as groupnorm_silu_triton

    return functools.partial(groupnorm_silu_triton.groupnorm_silu, launch=launch)(*args)


def _by_torch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    silu: bool,
    add: torch.Tensor | None,
    skip: torch.Tensor | None,
    ahead: torch.Tensor | None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    if skip is not None:
        x = torch.cat([x, skip], dim=-1)
    if add is not None:
        x = x + add[:, None, None, :]
    # `F.group_norm` refuses one pixel with one channel per group, whose result is the bias.
    y = torch.group_norm(x.permute(0, 3, 1, 2), groups, weight, bias, eps).permute(0, 2, 3, 1)
    y = F.silu(y) if silu else y
    return y if ahead is None else (y, x + ahead)


def _launches(thorough: bool, x: torch.Tensor, weight: torch.Tensor, bias: Any, groups: int, *_: Any) -> list[Any]:
    pixels = x.shape[1] * x.shape[2]
    return variants.groupnorm_silu(
        thorough, architecture.class_of(x.device), pixels, len(weight), groups, x.element_size()
    )


OP = GpuOp(
    "groupnorm_silu",
    groupnorm_silu_ref,
    (
        OpCandidate("triton", _by_triton, launches=_launches, launch_types=(GroupNormLaunch,)),
        OpCandidate("torch", _by_torch),
    ),
)


class _Norm(NamedTuple):
    """What the ways of the CPU are given beside the map: the arguments of `groupnorm_silu`."""

    weight: torch.Tensor
    bias: torch.Tensor
    groups: int
    eps: float
    silu: bool


def _groupnorm_silu_cpu(x: torch.Tensor, norm: _Norm, add: torch.Tensor | None) -> torch.Tensor:
    """The CPU path. No sum of an image depends on its batch."""
    way = choices.way("groupnorm_silu", x.dtype, x.numel() // len(x))
    if way == "contiguous":
        return _by_contiguous(x, norm, add)
    if way == "direct" and x.shape[1] * x.shape[2] <= PIXELS:
        if len(x) == 1:
            return _directly(x, norm, add)
        adds = [add] * len(x) if add is None or len(add) == 1 else add.split(1)
        return torch.cat([_directly(image, norm, own) for image, own in zip(x.split(1), adds)])
    return _by_moments(x, norm, add)


def _by_contiguous(x: torch.Tensor, norm: _Norm, add: torch.Tensor | None) -> torch.Tensor:
    """A copy in channels-first memory, where PyTorch's group norm is exact (Welford's update) and sums row by row."""
    x = x if add is None else x + add[:, None, None, :]
    y = torch.group_norm(x.permute(0, 3, 1, 2).contiguous(), norm.groups, norm.weight, norm.bias, norm.eps)
    return (activate_by_image(y, "silu") if norm.silu else y).permute(0, 2, 3, 1).contiguous()


def _directly(x: torch.Tensor, norm: _Norm, add: torch.Tensor | None) -> torch.Tensor:
    """PyTorch's norm of one channels-last image, where it is accurate (`_largest_mean`).

    Otherwise in fp32 that of the image less the mean which it found, which is near enough; else by moments.
    """
    _, height, width, channels = x.shape
    groups = norm.groups
    shifted = x if add is None else x + add[:, None, None, :]
    for _ in range(2 if x.dtype == torch.float32 else 1):
        chw = shifted.permute(0, 3, 1, 2)
        y, mean, r = torch.native_group_norm(chw, norm.weight, norm.bias, 1, channels, height * width, groups, norm.eps)
        if float((mean * r).abs_().max()) <= _largest_mean(height * width):
            y = y.permute(0, 2, 3, 1)
            return (F.silu(y, inplace=True) if norm.silu else y).contiguous()
        shifted = shifted - mean.view(groups, 1).expand(groups, channels // groups).reshape(channels)
    return _by_moments(x, norm, add)


@functools.lru_cache(maxsize=1024)
def _largest_mean(pixels: int) -> float:
    """|mean| / deviation of a group up to which E[x^2] - E[x]^2 is as accurate as moments of short sums.

    A sum of n terms in one chain is off by about s = 2 sqrt(n) u of the terms' sizes (the probabilistic bound of Higham
    and Mary 2019 with lambda = 2). With m = |mean| / deviation and in variances, E[x^2] is off by s (1 + m^2) and
    E[x]^2 by 2 s m sqrt(1 + m^2), together less than s (m + sqrt(1 + m^2))^2 = s exp(2 asinh(m)). Half of that, the
    share of the deviation, shall be at most 3 / 2 TERMS u, what short sums and their merging are allowed.
    """
    return math.sinh(0.5 * math.log(1.5 * TERMS / pixels**0.5))


def _by_moments(x: torch.Tensor, norm: _Norm, add: torch.Tensor | None) -> torch.Tensor:
    """Moments of short sums, merged; then one pass for the normalisation of each image, and one for SiLU in place."""
    batch, channels = len(x), x.shape[-1]
    weight, bias, groups = norm.weight.float(), norm.bias.float(), norm.groups
    rows = x.reshape(batch, -1, channels).contiguous()
    shift = None if add is None else add.float().view(len(add), groups, -1)
    mean, variance = _moments(rows, groups, shift)
    if shift is not None:
        mean = mean - shift
    if x.dtype == torch.float32:
        scale = variance.add_(norm.eps).rsqrt_() * weight.view(groups, -1)
        offset = torch.addcmul(bias.view(groups, -1), mean, scale, value=-1)
        scale, offset = scale.view(batch, 1, channels), offset.view(batch, 1, channels)
        out = torch.empty_like(rows)
        parts = (rows, out, scale, offset)
        for image, y, a, b in [parts] if batch == 1 or undivided(rows) else zip(*(part.split(1) for part in parts)):
            torch.addcmul(b, image, a, out=y)
            if norm.silu:
                F.silu(y, inplace=True)
        return out.view(x.shape)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    mean, variance = (m.expand(batch, groups, channels // groups).reshape(batch, channels) for m in (mean, variance))
    for i in range(batch):
        # With statistics for every channel, this is batch normalisation, which computes in fp32.
        y = F.batch_norm(x[i : i + 1].permute(0, 3, 1, 2), mean[i], variance[i], weight, bias, eps=norm.eps)
        y = y.permute(0, 2, 3, 1)
        out[i : i + 1] = F.silu(y, inplace=True) if norm.silu else y
    return out


def _moments(rows: torch.Tensor, groups: int, shift: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of the groups of `rows + shift`, `[B, S, C]` and `[B or 1, G, C / G]`: `[B, G, 1]` fp32 each.

    For channels-last maps, PyTorch's group norm computes E[x^2] - E[x]^2 in fp32 sums over all pixels. Its error is
    3e-4 at 512 x 512, and unbounded if |mean| >> std. Here sums of `terms` pixels take two passes each, the second
    while they are in the cache, and are merged pairwise (Chan, Golub and LeVeque 1983, equation 2.1).
    """
    batch, size, channels = rows.shape
    terms, width = _division(size, channels)
    unused = rows.new_empty(width * channels, dtype=torch.float32)
    # `width` pixels are read as one of more channels: as many more sums in parallel.
    blocks = rows.view(-1, 1, terms, width * channels).permute(0, 3, 1, 2)
    if len(blocks) == 1:
        means, variances = torch.batch_norm_update_stats(blocks, unused, unused, 0.0)
    else:
        parts = [torch.batch_norm_update_stats(block, unused, unused, 0.0) for block in blocks.split(1)]
        means, variances = (torch.cat(part) for part in zip(*parts))
    means, variances = (part.view(batch, -1, groups, channels // groups) for part in (means, variances))
    if shift is not None:
        means = means + shift[:, None]
    between, mean = torch.var_mean(means, (1, 3), correction=0, keepdim=True)
    variance = variances.mean((1, 3), keepdim=True).add_(between)
    return mean.view(batch, groups, 1), variance.view(batch, groups, 1)


@functools.lru_cache(maxsize=1024)
def _division(size: int, channels: int) -> tuple[int, int]:
    """How `size` pixels are summed: (terms of one sum, pixels side by side); their product divides `size`.

    Terms are the largest divisor up to TERMS, if that is not very small; else the smallest one above.
    """
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    terms = max(d for d in divisors if d <= TERMS)
    if terms < TERMS // 8:
        terms = min((d for d in divisors if d > TERMS), default=terms)
    side = [d for d in divisors if size // terms % d == 0 and d * channels <= max(WIDTH, channels)]
    return terms, max(side)
