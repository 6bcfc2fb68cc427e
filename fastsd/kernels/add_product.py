"""A matrix product added to a tensor in its place: a residual connection without a pass of its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastsd.kernels import candidates, dispatch
from fastsd.kernels.candidates import GpuOp, OpCandidate


def add_product_ref(total: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    """The specification of `add_product`: product and sum in fp32, rounded once."""
    total.copy_(dispatch.widen(total) + dispatch.widen(x) @ dispatch.widen(weight).T)


def add_product(total: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    """`total += x weight^T`.

    Args:
        total: `[..., N]`, changed in place.
        x: `[..., K]`.
        weight: `[N, K]`.
    """
    backend = dispatch.backend(x, weight, total)
    if backend == "reference":
        add_product_ref(total, x, weight)
    elif backend == "triton":
        candidates.run(OP, total, x, weight)
    else:
        _by_torch(total, x, weight)


def _by_addmm(total: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    """By cuBLAS, which reads `total` in its epilogue. Out of place, PyTorch would copy it first."""
    total.view(-1, total.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), weight.T)


def _needs_rows(total: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> str | None:
    return None if total.is_contiguous() else f"total has strides {list(total.stride())}; it needs to be contiguous"


def _by_torch(total: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    total.add_(F.linear(x, weight))


OP = GpuOp(
    "add_product",
    add_product_ref,
    (OpCandidate("cublas", _by_addmm, _needs_rows), OpCandidate("torch", _by_torch)),
    in_place=(0,),
)
