"""Layer normalisation over the last dimension (Ba et al. 2016, equation 4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastsd.kernels import dispatch


def layernorm_ref(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """The specification of `layernorm`: two-pass statistics in fp32."""
    y = dispatch.widen(x)
    y = y - y.mean(-1, keepdim=True)
    y = y * (y.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (y * weight + bias).to(x.dtype)


def layernorm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalise each row of `x` `[..., C]` to mean 0 and variance 1, then scale by `weight` and shift by `bias` `[C]`.

    Returns `[..., C]` in the dtype of `x`.
    """
    if dispatch.backend(x) == "reference":
        return layernorm_ref(x, weight, bias, eps)
    return F.layer_norm(x, weight.shape, weight, bias, eps)
