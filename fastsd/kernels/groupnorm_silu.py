"""Group normalisation over channels-last maps, with SiLU (Wu and He 2018, equations 1 to 3 and 6)."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
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
SHARED = 1024  # pixels of an image from which on PyTorch's norm divides those of a batch among the threads
WIDTH = 2048  # sums in parallel: they, and the row that is added to them, stay in the first cache
LANES = 8  # of a vector of AVX2; AVX-512 has twice as many
PRODUCT = 2**16  # elements of a matrix that averages


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
    batch, pixels = len(x), x.shape[1] * x.shape[2]
    way = choices.way("groupnorm_silu", x.dtype, x.numel() // batch)
    if way == "contiguous":
        return _by_contiguous(x, norm, add)
    if way == "moments" or pixels > PIXELS:
        return _by_moments(x, norm, add)
    if batch == 1 or pixels < SHARED:
        return _directly(x, norm, add)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for image, own, y in zip(_images(x), _adds(add, batch), _images(out)):
        _directly(image, norm, own, y)
    return out


def _images(x: torch.Tensor) -> Sequence[torch.Tensor]:
    """`x` as batches of one."""
    return (x,) if len(x) == 1 else x.split(1)


def _adds(add: torch.Tensor | None, batch: int) -> Sequence[torch.Tensor | None]:
    """What is added to each image."""
    return [add] * batch if add is None or len(add) == 1 else add.split(1)


def _by_contiguous(x: torch.Tensor, norm: _Norm, add: torch.Tensor | None) -> torch.Tensor:
    """A copy in channels-first memory, where PyTorch's group norm is exact (Welford's update) and sums row by row."""
    x = x if add is None else x + add[:, None, None, :]
    y = torch.group_norm(x.permute(0, 3, 1, 2).contiguous(), norm.groups, norm.weight, norm.bias, norm.eps)
    return (activate_by_image(y, "silu") if norm.silu else y).permute(0, 2, 3, 1).contiguous()


def _directly(x: torch.Tensor, norm: _Norm, add: torch.Tensor | None, out: torch.Tensor | None = None) -> torch.Tensor:
    """PyTorch's norm of channels-last images, and moments for those where it is not accurate (`_largest_mean`).

    Args:
        out: for the result, of one image; None: a new tensor.
    """
    batch, height, width, channels = x.shape
    total = x if add is None else x + add[:, None, None, :]
    y, mean, r = torch.native_group_norm(
        total.permute(0, 3, 1, 2), norm.weight, norm.bias, batch, channels, height * width, norm.groups, norm.eps
    )
    limit = _largest_mean(height * width, channels // norm.groups)
    inaccurate = [k for k, ratios in enumerate((mean * r).tolist()) if min(ratios) < -limit or max(ratios) > limit]
    if len(inaccurate) == batch:
        return _by_moments(x, norm, add, out)
    y = y.permute(0, 2, 3, 1).contiguous()
    if out is not None:
        return torch.ops.aten.silu.out(y, out=out) if norm.silu else out.copy_(y)
    if norm.silu:
        for part in (y,) if batch == 1 or undivided(y) else y.split(1):
            F.silu(part, inplace=True)
    for k in inaccurate:
        _normalise(x[k : k + 1], norm, _adds(add, batch)[k], y[k : k + 1])
    return y


@functools.lru_cache(maxsize=1024)
def _largest_mean(pixels: int, channels: int) -> float:
    """|mean| / deviation of a group of `channels` up to which E[x^2] - E[x]^2 is as accurate as moments of short sums.

    PyTorch adds up a group in one chain for each channel or, from LANES channels on, in LANES chains. A sum of n terms
    in k chains, whose roundings are independent, is off by about s = 2 sqrt(n) / k u of the terms' sizes (the
    probabilistic bound of Higham and Mary 2019 with lambda = 2). With m = |mean| / deviation and in variances, E[x^2]
    is off by s (1 + m^2) and E[x]^2 by 2 s m sqrt(1 + m^2), together less than s (m + sqrt(1 + m^2))^2 =
    s exp(2 asinh(m)). Half of that, the share of the deviation, shall be at most 3 / 2 TERMS u, what short sums and
    their merging are allowed.
    """
    chains = min(channels, LANES)
    return math.sinh(0.5 * math.log(1.5 * TERMS * chains / (pixels * channels) ** 0.5))


def _by_moments(
    x: torch.Tensor, norm: _Norm, add: torch.Tensor | None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Image by image: moments of short sums, merged; one pass for the normalisation, and one for SiLU in place."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    for image, own, y in zip(_images(x), _adds(add, len(x)), _images(out)):
        _normalise(image, norm, own, y)
    return out


def _normalise(x: torch.Tensor, norm: _Norm, add: torch.Tensor | None, out: torch.Tensor) -> None:
    """`_by_moments` of one image, into `out`."""
    weight, bias = norm.weight.float(), norm.bias.float()
    mean, variance = _moments(x.contiguous(), norm.groups, None if add is None else add.float())
    if x.dtype == torch.float32:
        scale = variance.add_(norm.eps).rsqrt_().mul_(weight)
        torch.addcmul(torch.addcmul(bias, mean, scale, value=-1), x, scale, out=out)
        if norm.silu:
            F.silu(out, inplace=True)
    else:  # with statistics for every channel, this is batch normalisation, which computes in fp32
        y = F.batch_norm(x.permute(0, 3, 1, 2), mean, variance, weight, bias, eps=norm.eps)
        out.copy_((F.silu(y, inplace=True) if norm.silu else y).permute(0, 2, 3, 1))


def _moments(x: torch.Tensor, groups: int, add: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean, less `add`, and variance of each channel's group of `x + add`, `[1, H, W, C]` and `[1, C]`: `[C]` in fp32.

    For channels-last maps, PyTorch's group norm computes E[x^2] - E[x]^2 in fp32 sums over all pixels. Its error is
    3e-4 at 512 x 512, and unbounded if |mean| >> std. Here sums of `terms` pixels take two passes each, the second
    while they are in the cache. The variance of all is the mean of theirs and of their means' squared distances.
    """
    _, height, width, channels = x.shape
    terms, side = _division(height * width, channels)
    unused = None if x.dtype == torch.float32 else x.new_empty(side * channels, dtype=torch.float32)
    # `side` pixels are read as one of more channels: as many more sums in parallel.
    blocks = x.view(-1, 1, terms, side * channels).permute(0, 3, 1, 2)
    parts = [torch.batch_norm_update_stats(block, unused, unused, 0.0) for block in _images(blocks)]
    means, variances = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts))
    means = means.view(-1, channels) if add is None else means.view(-1, channels) + add
    mean = _group_means(means, groups)
    distances = means - mean
    variance = _group_means(torch.addcmul(variances.view(-1, channels), distances, distances), groups)
    return (mean if add is None else mean - add[0]), variance


def _group_means(values: torch.Tensor, groups: int) -> torch.Tensor:
    """`[N, C]` to `[C]`: for each channel, the mean of its group's values."""
    count, channels = values.shape
    if count * channels**2 <= PRODUCT:
        return torch.mv(_averaging(count, channels, groups), values.flatten())
    means = values.view(count, groups, -1).mean((0, 2))
    return means[:, None].expand(groups, channels // groups).flatten()


@functools.lru_cache(maxsize=64)
def _averaging(count: int, channels: int, groups: int) -> torch.Tensor:
    """The matrix of `_group_means`, `[C, N * C]`: of few values, one product takes a third of the calls' time."""
    with torch.inference_mode(False):
        group = torch.arange(channels, dtype=torch.int64, device="cpu") // (channels // groups)
        return (group[:, None] == group).float().div_(count * channels // groups).repeat(1, count)


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
