"""`geglu` of fp8 operands (e4m3), see `fastsd.kernels.linear_fp8`."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastsd.kernels import candidates, dispatch
from fastsd.kernels.candidates import GpuOp, OpCandidate
from fastsd.kernels.launch import architecture, variants
from fastsd.kernels.launch.linear import Gemm
from fastsd.kernels.linear_fp8 import dequantized, product_by_cublaslt, product_ref, quantize


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


def _by_triton(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, launch: Gemm | None = None
) -> torch.Tensor:
    from fastsd.kernels.triton import geglu_fp8 as geglu_fp8_triton

    return geglu_fp8_triton.geglu_fp8(x, weight, scale, bias, launch)


def _launches(
    thorough: bool, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor
) -> list[Gemm]:
    rows, (columns, depth) = x[..., 0].numel(), weight.shape
    key = architecture.class_of(x.device)
    return variants.products(thorough, key, rows, columns // 2, depth, 1, weight.element_size())


def _by_cublaslt(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The product by PyTorch's of fp8, the rest by our kernel."""
    from fastsd.kernels.triton import geglu as geglu_triton

    return geglu_triton.geglu_gate(product_by_cublaslt(x, weight, scale, None, None), bias)


def _by_16_bits(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The product of the same numbers in the dtype of `x`, which PyTorch computes everywhere."""
    rows, matrix = dequantized(*quantize(x), x.dtype), dequantized(weight, scale, x.dtype)
    value, gate = F.linear(rows, matrix, bias).chunk(2, dim=-1)
    return value * F.gelu(gate)


def _refused_by_triton(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> str | None:
    from fastsd.kernels.triton import linear_fp8 as linear_fp8_triton

    return linear_fp8_triton.refuses(x, weight, scale, bias, gated=True)


OP = GpuOp(
    "geglu_fp8",
    geglu_fp8_ref,
    (
        OpCandidate("triton", _by_triton, _refused_by_triton, partial=True, launches=_launches, launch_types=(Gemm,)),
        OpCandidate("cublaslt, then triton", _by_cublaslt, _refused_by_triton, measured=True),
        OpCandidate("torch", _by_16_bits),
    ),
)
