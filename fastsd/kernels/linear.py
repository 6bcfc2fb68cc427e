"""Matrix products with their epilogue: bias, activation, residual."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastsd.kernels import dispatch


def activate(x: torch.Tensor, activation: str) -> torch.Tensor:
    """`x` through "none", "silu", "gelu" (exact) or "quick_gelu" (x * sigmoid(1.702 x), as in CLIP)."""
    if activation == "none":
        return x
    if activation == "silu":
        return F.silu(x)
    if activation == "gelu":
        return F.gelu(x)
    if activation == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    raise ValueError(f"linear: no activation {activation!r}; there are none, silu, gelu, quick_gelu")


def linear_ref(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """The specification of `linear`: products and sums in fp32, rounded once."""
    y = dispatch.widen(x) @ dispatch.widen(weight).T
    if bias is not None:
        y = y + bias
    y = activate(y, activation)
    return (y if residual is None else y + residual).to(x.dtype)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """`activation(x weight^T + bias) + residual`.

    Args:
        x: `[..., K]`.
        weight: `[N, K]`; bias: `[N]`.
        activation: "none", "silu", "gelu" or "quick_gelu".
        residual: `[..., N]`.

    Returns:
        `[..., N]` in the dtype of `x`.
    """
    if dispatch.backend(x) == "reference":
        return linear_ref(x, weight, bias, activation, residual)
    y = activate(F.linear(x, weight, bias), activation)
    return y if residual is None else y + residual
