"""Layer normalisation over the last dimension (Ba et al. 2016, equation 4)."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F

from fastsd.kernels import candidates, dispatch
from fastsd.kernels.candidates import GpuOp, OpCandidate
from fastsd.kernels.launch import architecture, variants
from fastsd.kernels.launch.rowwise import RowwiseLaunch

Vectors = tuple[torch.Tensor, ...]


def layernorm_ref(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, ahead: Vectors = (), owed: Vectors = ()
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The specification of `layernorm`: two-pass statistics in fp32."""
    total = dispatch.widen(x)
    for vector in owed:
        total = total - dispatch.widen(vector)
    y = total - total.mean(-1, keepdim=True)
    y = y * (y.square().mean(-1, keepdim=True) + eps).rsqrt()
    y = (y * weight + bias).to(x.dtype)
    for vector in ahead:
        total = total + dispatch.widen(vector)
    return (y, total.to(x.dtype)) if ahead else y


def layernorm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, ahead: Vectors = (), owed: Vectors = ()
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Normalise each row to mean 0 and variance 1, then scale by `weight` and shift by `bias`.

    A matrix product can be added to `x` in place, but a product with a bias cannot. So the norm before adds the biases
    of later products to `x` ahead of them, and norms between them take off what is not due yet.

    Args:
        x: `[..., C]`.
        weight, bias: `[C]`.
        eps: added to the variance.
        ahead: up to three vectors `[C]`; with them, `x` plus their sum is returned too.
        owed: up to three vectors `[C]` that `x` includes and the norm should not see.

    Returns:
        `[..., C]` in the dtype of `x`: `norm(x - owed)`; with `ahead` also `x - owed + ahead`, a new tensor.
    """
    backend = dispatch.backend(x, weight, bias, *ahead, *owed)
    if backend == "reference":
        return layernorm_ref(x, weight, bias, eps, ahead, owed)
    if backend == "triton":
        return candidates.run(OP, x, weight, bias, eps, ahead, owed)
    return _by_torch(x, weight, bias, eps, ahead, owed)


def _by_triton(*args: Any, launch: RowwiseLaunch | None = None) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    from fastsd.kernels.triton import layernorm as layernorm_triton

    return functools.partial(layernorm_triton.layernorm, launch=launch)(*args)


def _by_torch(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, ahead: Vectors, owed: Vectors
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    x = x - sum(owed[1:], owed[0]) if owed else x
    y = F.layer_norm(x, weight.shape, weight, bias, eps)
    return (y, x + sum(ahead[1:], ahead[0])) if ahead else y


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
