"""Layer normalisation over the last dimension (Ba et al. 2016, equation 4)."""

from __future__ import annotations

import functools
from typing import Any, overload

import torch
import torch.nn.functional as F

from fastsd.kernels import candidates, dispatch
from fastsd.kernels.candidates import GpuOp, OpCandidate
from fastsd.kernels.launch import architecture, variants
from fastsd.kernels.launch.rowwise import RowwiseLaunch


def layernorm_ref(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The specification of `layernorm`: two-pass statistics in fp32."""
    total = dispatch.widen(x) if residual is None else dispatch.widen(x) + residual
    y = total - total.mean(-1, keepdim=True)
    y = y * (y.square().mean(-1, keepdim=True) + eps).rsqrt()
    y = (y * weight + bias).to(x.dtype)
    return y if residual is None else (y, total.to(x.dtype))


@overload
def layernorm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor: ...


@overload
def layernorm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, residual: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]: ...


def layernorm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Normalise each row to mean 0 and variance 1, then scale by `weight` and shift by `bias`.

    Args:
        x: `[..., C]`.
        weight, bias: `[C]`.
        eps: added to the variance.
        residual: like `x`; it is added before.

    Returns:
        `[..., C]` in the dtype of `x`; with a residual the normalised sum and the sum.
    """
    backend = dispatch.backend(x, weight, bias, residual)
    if backend == "reference":
        return layernorm_ref(x, weight, bias, eps, residual)
    if backend == "triton":
        return candidates.run(OP, x, weight, bias, eps, residual)
    return _by_torch(x, weight, bias, eps, residual)


def _by_triton(*args: Any, launch: RowwiseLaunch | None = None) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    from fastsd.kernels.triton import layernorm as layernorm_triton

    return functools.partial(layernorm_triton.layernorm, launch=launch)(*args)


def _by_torch(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, residual: torch.Tensor | None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    total = x if residual is None else x + residual
    y = F.layer_norm(total, weight.shape, weight, bias, eps)
    return y if residual is None else (y, total)


def _launches(thorough: bool, x: torch.Tensor, *_: Any) -> list[RowwiseLaunch]:
    return variants.rows("layernorm", thorough, architecture.class_of(x.device), x.shape[-1])


OP = GpuOp(
    "layernorm",
    layernorm_ref,
    (
        OpCandidate("triton", _by_triton, launches=_launches, launch_types=(RowwiseLaunch,)),
        OpCandidate("torch", _by_torch),
    ),
)
