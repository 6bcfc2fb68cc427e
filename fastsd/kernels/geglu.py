"""GEGLU: the gated feed-forward of the transformer blocks, with its product (Shazeer 2020, equation 6)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastsd.cuda import blas
from fastsd.kernels import candidates, dispatch
from fastsd.kernels.candidates import GpuOp, OpCandidate
from fastsd.kernels.cpu import onednn
from fastsd.kernels.launch import architecture, variants
from fastsd.kernels.launch.linear import Gemm
from fastsd.kernels.launch.rowwise import RowwiseLaunch
from fastsd.kernels.linear import activate_by_image, product_by_image, small_products

CHUNK = 2**21  # elements of the result that the oneDNN path computes at a time: they stay in the cache


def geglu_ref(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The specification of `geglu`, with the exact (erf) GELU in fp32."""
    y = dispatch.widen(x) @ dispatch.widen(weight).T + dispatch.widen(bias)
    value, gate = y.chunk(2, dim=-1)
    return (value * 0.5 * gate * (1 + torch.erf(gate * 0.5**0.5))).to(x.dtype)


def geglu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """`value * gelu(gate)` for (value, gate) = `x weight^T + bias`.

    Args:
        x: `[..., K]`.
        weight: `[2 * N, K]`: the rows of the value, then those of the gate; bias: `[2 * N]`.

    Returns:
        `[..., N]` in the dtype of `x`.
    """
    backend = dispatch.backend(x, weight, bias)
    if backend == "reference":
        return geglu_ref(x, weight, bias)
    if backend == "onednn":
        return _geglu_onednn(x, weight, bias)
    if backend == "triton":
        return candidates.run(OP, x, weight, bias)
    return _by_torch(x, weight, bias)


def _by_gate(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, launch: RowwiseLaunch | None = None
) -> torch.Tensor:
    """The product by cuBLAS, the rest by our kernel."""
    from fastsd.kernels.triton import geglu as geglu_triton

    return geglu_triton.geglu_gate(F.linear(x, weight), bias, launch)


def _by_cublaslt(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """As `_by_gate`, with the product by cuBLASLt."""
    with blas.preferred("cublaslt"):
        return _by_gate(x, weight, bias)


def _by_triton(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, launch: Gemm | None = None) -> torch.Tensor:
    """The whole op by our kernel: the product, of twice as many columns as the result, is never written."""
    from fastsd.kernels.triton import linear as linear_triton

    return linear_triton.geglu(x, weight, bias, launch)


def _refused_by_triton(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> str | None:
    from fastsd.kernels.triton import linear as linear_triton

    return linear_triton.refuses(x, weight, bias, op="geglu")


def _by_torch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    value, gate = F.linear(x, weight, bias).chunk(2, dim=-1)
    return value * activate_by_image(gate, "gelu")


def _launches(thorough: bool, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> list[Gemm]:
    rows, depth = x[..., 0].numel(), x.shape[-1]
    return variants.products(
        thorough, architecture.class_of(x.device), rows, len(weight) // 2, depth, 1, x.element_size()
    )


def _gate_launches(thorough: bool, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> list[RowwiseLaunch]:
    return variants.rows("geglu", thorough, architecture.class_of(x.device), len(weight) // 2)


OP = GpuOp(
    "geglu",
    geglu_ref,
    (
        OpCandidate("triton", _by_triton, _refused_by_triton, partial=True, launches=_launches, launch_types=(Gemm,)),
        OpCandidate("cublas, then triton", _by_gate, launches=_gate_launches, launch_types=(RowwiseLaunch,)),
        OpCandidate("cublaslt, then triton", _by_cublaslt, measured=True, tuned=True),
        OpCandidate("torch", _by_torch),
    ),
)


def _geglu_onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Two products, the second with GELU in its epilogue. No pass reads half a row, and no result has 2 * N columns."""
    if small_products(x, weight, "geglu") == "torch":
        value, gate = product_by_image(x, weight, bias).chunk(2, dim=-1)
        return activate_by_image(gate, "gelu").mul_(value)
    rows = x.reshape(-1, x.shape[-1])
    (value_weight, gate_weight), (value_bias, gate_bias) = weight.chunk(2), bias.chunk(2)
    step = max(CHUNK // len(value_weight), 1)
    out = x.new_empty(len(rows), len(value_weight))
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        value = onednn.matmul(part, value_weight, value_bias)
        gate = onednn.matmul(part, gate_weight, gate_bias, "gelu")
        torch.mul(value, gate, out=out[start : start + step])
    return out.view(*x.shape[:-1], -1)
