"""`geglu` of fp8 operands (e4m3), see `fastsd.kernels.linear_fp8`."""

from __future__ import annotations

import torch

from fastsd.kernels import candidates, dispatch
from fastsd.kernels.candidates import GpuOp, OpCandidate
from fastsd.kernels.linear_fp8 import product_ref


def geglu_fp8_ref(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The specification of `geglu_fp8`: quantised rows, the rest in fp32, with the exact (erf) GELU."""
    value, gate = (product_ref(x, weight, scale) + bias).chunk(2, dim=-1)
    return (value * 0.5 * gate * (1 + torch.erf(gate * 0.5**0.5))).to(x.dtype)


def geglu_fp8(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """`value * gelu(gate)` for (value, gate) = `quantized(x) (weight scale)^T + bias`.

    Args:
        x: `[..., K]` in 16 bits or fp32.
        weight: `[2 * N, K]` e4m3: the rows of the value, then those of the gate; scale: `[2 * N]` fp32.
        bias: `[2 * N]` in the dtype of `x`.

    Returns:
        `[..., N]` in the dtype of `x`.
    """
    if dispatch.backend(x, bias) == "triton":
        return candidates.run(OP, x, weight, scale, bias)
    return geglu_fp8_ref(x, weight, scale, bias)


def _by_triton(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    from fastsd.kernels.triton import geglu_fp8 as geglu_fp8_triton

    return geglu_fp8_triton.geglu_fp8(x, weight, scale, bias)


def _refused_by_triton(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> str | None:
    from fastsd.kernels.triton import linear_fp8 as linear_fp8_triton

    return linear_fp8_triton.refuses(x, weight, scale, bias, gated=True)


OP = GpuOp(
    "geglu_fp8",
    geglu_fp8_ref,
    (OpCandidate("triton", _by_triton, _refused_by_triton, partial=True), OpCandidate("torch", geglu_fp8_ref)),
)
