"""Group normalisation over channels-last maps, with SiLU (Wu and He 2018, equations 1 to 3 and 6)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastsd.kernels import dispatch


def groupnorm_silu_ref(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    silu: bool = True,
    add: torch.Tensor | None = None,
) -> torch.Tensor:
    """The specification of `groupnorm_silu`: two-pass statistics in fp32 (E[x^2] - E[x]^2 cancels at large means)."""
    batch, height, width, channels = x.shape
    y = dispatch.widen(x)
    if add is not None:
        y = y + add[:, None, None, :]
    y = y.reshape(batch, height * width, groups, channels // groups)
    y = y - y.mean((1, 3), keepdim=True)
    y = y * (y.square().mean((1, 3), keepdim=True) + eps).rsqrt()
    y = y.reshape(x.shape) * weight + bias
    return (y * torch.sigmoid(y) if silu else y).to(x.dtype)


def groupnorm_silu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    silu: bool = True,
    add: torch.Tensor | None = None,
) -> torch.Tensor:
    """`silu(group_norm(x + add))`, in the layout that convolutions and attention share.

    Args:
        x: `[B, H, W, C]`.
        weight, bias: `[C]`.
        groups: number of groups; divides C.
        eps: added to the variance.
        silu: apply x * sigmoid(x) afterwards.
        add: `[B or 1, C]`, added to every pixel first (the time embedding of a residual block).

    Returns:
        `[B, H, W, C]` in the dtype of `x`.

    Raises:
        ValueError: `groups` does not divide C.
    """
    if x.shape[-1] % groups:
        raise ValueError(f"groupnorm_silu: {groups} groups do not divide {x.shape[-1]} channels")
    backend = dispatch.backend(x, weight, bias, add)
    if backend == "reference":
        return groupnorm_silu_ref(x, weight, bias, groups, eps, silu, add)
    if backend == "onednn":
        return _groupnorm_silu_by_image(x, weight, bias, groups, eps, silu, add)
    if add is not None:
        x = x + add[:, None, None, :]
    y = F.group_norm(x.permute(0, 3, 1, 2), groups, weight, bias, eps).permute(0, 2, 3, 1)
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
    """PyTorch's norm, which divides the pixels of a whole batch among threads and so sums them in an order that
    depends on the batch; image by image it does not, and an image stays in the cache between the passes."""
    images = []
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if len(x) > 1 else None
    for b in range(len(x)):
        image = x[b : b + 1]
        if add is not None:
            image = image + (add[b] if len(add) > 1 else add[0])
        y = F.group_norm(image.permute(0, 3, 1, 2), groups, weight, bias, eps).permute(0, 2, 3, 1)
        if silu:
            y = torch.ops.aten.silu.out(y, out=y if out is None else out[b : b + 1])
        images.append(y)
    if out is None:
        return images[0]
    return out if silu else torch.cat(images, out=out)
