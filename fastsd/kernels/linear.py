"""Matrix products with their epilogue: bias, activation, residual."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastsd.kernels import dispatch, onednn


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
    backend = dispatch.backend(x, weight, bias, residual)
    if backend == "reference":
        return linear_ref(x, weight, bias, activation, residual)
    if backend == "onednn":
        return _linear_onednn(x, weight, bias, activation, residual)
    y = activate(F.linear(x, weight, bias), activation)
    return y if residual is None else y + residual


def _linear_onednn(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str, residual: torch.Tensor | None
) -> torch.Tensor:
    """`linear` with what oneDNN can fuse fused: an activation, or a residual where there is no activation."""
    rows = x.reshape(-1, x.shape[-1])
    shape = (*x.shape[:-1], len(weight))
    if residual is not None and activation == "none":
        return onednn.matmul_add(rows, weight, bias, residual.reshape(-1, len(weight))).view(shape)
    fused = activation if activation in onednn.ACTIVATIONS else "none"
    y = onednn.matmul(rows, weight, bias, fused).view(shape)
    y = y if fused == activation else activate(y, activation)
    return y if residual is None else y + residual
