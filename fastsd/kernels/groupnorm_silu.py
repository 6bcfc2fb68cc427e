"""Group normalisation over channels-last maps, with SiLU (Wu and He 2018, equations 1 to 3 and 6)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastsd.kernels import dispatch

# The CPU path.
BLOCK = 4096  # pixels whose statistics are computed at a time
TERMS = 64  # terms of one fp32 sum


def groupnorm_silu_ref(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    silu: bool = True,
    add: torch.Tensor | None = None,
    skip: torch.Tensor | None = None,
) -> torch.Tensor:
    """The specification of `groupnorm_silu`: two-pass statistics in fp32 (E[x^2] - E[x]^2 cancels at large means)."""
    if skip is not None:
        x = torch.cat([x, skip], dim=-1)
    batch, height, width, channels = x.shape
    y = dispatch.widen(x)
    if add is not None:
        y = y + add[:, None, None, :]
    y = y.reshape(batch, height * width, groups, -1).transpose(1, 2).flatten(2)  # one row for each group
    y = y - y.mean(-1, keepdim=True)
    y = y * (y.square().mean(-1, keepdim=True) + eps).rsqrt()
    y = y.unflatten(2, (height * width, channels // groups)).transpose(1, 2).reshape(x.shape) * weight + bias
    return (y * torch.sigmoid(y) if silu else y).to(x.dtype)


def groupnorm_silu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    silu: bool = True,
    add: torch.Tensor | None = None,
    skip: torch.Tensor | None = None,
) -> torch.Tensor:
    """`silu(group_norm(cat([x, skip]) + add))`, in the channels-last layout of convolutions and attention.

    Args:
        x: `[B, H, W, C1]`.
        weight, bias: `[C]`, C = C1 or, with `skip`, C1 + C2.
        groups: number of groups; divides C.
        eps: added to the variance.
        silu: apply x * sigmoid(x) afterwards.
        add: `[B or 1, C]`, added to every pixel first (the time embedding of a residual block).
        skip: `[B, H, W, C2]`, further channels (a skip connection), which the kernel reads in place.

    Returns:
        `[B, H, W, C]` in the dtype of `x`.

    Raises:
        ValueError: `groups` does not divide C.
    """
    channels = x.shape[-1] + (0 if skip is None else skip.shape[-1])
    if channels % groups:
        raise ValueError(f"groupnorm_silu: {groups} groups do not divide {channels} channels")
    backend = dispatch.backend(x, weight, bias, add, skip, op="groupnorm_silu")
    if backend == "reference":
        return groupnorm_silu_ref(x, weight, bias, groups, eps, silu, add, skip)
    if backend == "triton":
        from fastsd.kernels.triton import groupnorm_silu as groupnorm_silu_triton

        return groupnorm_silu_triton.groupnorm_silu(x, weight, bias, groups, eps, silu, add, skip)
    if skip is not None:
        x = torch.cat([x, skip], dim=-1)
    if backend == "onednn":
        return _groupnorm_silu_by_image(x, weight, bias, groups, eps, silu, add)
    if add is not None:
        x = x + add[:, None, None, :]
    # `F.group_norm` refuses one pixel with one channel per group, whose result is the bias.
    y = torch.group_norm(x.permute(0, 3, 1, 2), groups, weight, bias, eps).permute(0, 2, 3, 1)
    return F.silu(y) if silu else y


def _groupnorm_silu_by_image(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    silu: bool,
    add: torch.Tensor | None,
) -> torch.Tensor:
    """The CPU path: image by image, so that the order of an image's sums does not depend on its batch."""
    weight, bias = weight.float(), bias.float()
    images = []
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if len(x) > 1 else None
    for b in range(len(x)):
        image, shift = x[b : b + 1], None
        if add is not None:
            shift = add[b if len(add) > 1 else 0].float()
        mean, variance = _statistics(image.flatten(0, 2), groups, shift)
        # With statistics for every channel, this is batch normalisation.
        y = F.batch_norm(image.permute(0, 3, 1, 2), mean, variance, weight, bias, eps=eps).permute(0, 2, 3, 1)
        if silu:
            y = torch.ops.aten.silu.out(y, out=y if out is None else out[b : b + 1])
        images.append(y)
    if out is None:
        return images[0]
    return out if silu else torch.cat(images, out=out)


def _statistics(rows: torch.Tensor, groups: int, shift: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean minus `shift`, and variance, of the groups of `rows + shift` `[S, C]`, per channel: `[C]` fp32 each.

    For channels-last maps, PyTorch's group norm computes E[x^2] - E[x]^2 in fp32 sums over all pixels. Its error is
    3e-4 at 512 x 512, and unbounded if |mean| >> std. Here short sums take two passes each, and are merged in float64
    (Chan, Golub and LeVeque 1983, equation 2.1).
    """
    channels = rows.shape[1]
    parts, counts = [], []
    for block in rows.split(BLOCK):
        # Read the block as TERMS pixels of more channels: more sums in parallel, each of TERMS terms.
        terms = TERMS if len(block) % TERMS == 0 else len(block)
        columns = block.reshape(terms, -1)
        unused = torch.zeros(columns.shape[1], dtype=torch.float32, device=rows.device)
        part = torch.batch_norm_update_stats(columns.T[None, :, :, None], unused, unused, 0.0)
        parts.append(torch.stack(part).view(2, -1, groups, channels // groups))
        counts += [terms] * (len(block) // terms)
    means, variances = torch.cat(parts, 1).double()  # [parts, groups, channels of a group]
    if shift is not None:
        means = means + shift.view(groups, -1)
    share = torch.tensor(counts, dtype=torch.float64, device=rows.device)[:, None, None] / (
        len(rows) * (channels // groups)
    )
    mean = (means * share).sum((0, 2))
    variance = ((variances + (means - mean[:, None]).square()) * share).sum((0, 2))
    mean, variance = (part.repeat_interleave(channels // groups).float() for part in (mean, variance))
    return mean if shift is None else mean - shift, variance
