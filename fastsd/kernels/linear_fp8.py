"""`linear` of fp8 operands (e4m3): weights quantised at load, rows of the activation as they come.

A scale is a power of two, so that dividing and multiplying by it is exact: every device quantises to the same bits.
Since e4m3 is a floating-point format, a finer scale would gain nothing but a binade at the bottom of 15.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F

from fastsd.kernels import candidates, dispatch
from fastsd.kernels.candidates import GpuOp, OpCandidate
from fastsd.kernels.launch import architecture, variants
from fastsd.kernels.launch.linear import Gemm
from fastsd.kernels.linear import activate

FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3


def row_scales(x: torch.Tensor) -> torch.Tensor:
    """The smallest power of two s with max|x| / s <= 448, for each row of `x` `[..., K]`. Returns `[...]` fp32.

    It is 2^k between the limits of normal fp32 numbers; k follows from the bits of max|x|: 448 = 1.75 * 2^8. A number
    that is none counts as infinity.
    """
    bits = x.abs().amax(dim=-1).float().view(torch.int32) & 0x7FFFFFFF
    bits = bits.clamp(max=0x7F800000)
    exponent = ((bits + 0x1FFFFF) >> 23) - 8  # biased; the sum carries where the significand exceeds 1.75
    return (exponent.clamp(1, 253) << 23).view(torch.float32)


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`x` `[..., K]` as e4m3 values, x / scales[..., None] rounded to nearest even, and the scales of its rows.

    Returns:
        `[..., K]` e4m3 and `[...]` fp32. A value that is no number stays none; an infinite one becomes 448 scales.
    """
    scales = row_scales(x)
    inverse = (254 << 23) - scales.view(torch.int32)  # the bits of 1 / scale
    values = x.float() * inverse.view(torch.float32)[..., None]
    return values.clamp(-LARGEST, LARGEST).to(FP8), scales


def linear_fp8_ref(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    residual: torch.Tensor | None = None,
    skip: torch.Tensor | None = None,
) -> torch.Tensor:
    """The specification of `linear_fp8`: quantised rows, products and sums in fp32, rounded once."""
    if skip is not None:
        x = torch.cat([x, skip], dim=-1)
    y = product_ref(x, weight, scale)
    if bias is not None:
        y = y + bias
    y = activate(y, activation)
    return (y if residual is None else y + residual).to(x.dtype)


def product_ref(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Quantised `x` times `weight^T`, in fp32, or in float64 if `x` is."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    values, scales = quantize(x)
    return values.to(wide) @ weight.to(wide).T * scales[..., None] * scale


def linear_fp8(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    residual: torch.Tensor | None = None,
    skip: torch.Tensor | None = None,
) -> torch.Tensor:
    """`activation(quantized(cat([x, skip])) (weight scale)^T + bias) + residual`.

    On a CPU the specification computes it: the same numbers, slowly.

    Args:
        x: `[..., K1]` in 16 bits or fp32.
        weight: `[N, K]` e4m3, K = K1 or, with `skip`, K1 + K2; scale: `[N]` fp32, see `quantize`.
        bias, activation, residual, skip: as of `fastsd.kernels.linear.linear`, in the dtype of `x`.

    Returns:
        `[..., N]` in the dtype of `x`.
    """
    arguments = x, weight, scale, bias, activation, residual, skip
    return candidates.run(OP, *arguments) if dispatch.backend(x, bias) == "triton" else linear_fp8_ref(*arguments)


def dequantized(values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Values `[..., K]` times the scales of their rows, in `dtype`.

    That is exact for numbers that were quantised from `dtype`: rounded to 4 significant bits, a number is a multiple of
    no less than it was before. In fp16 alone the largest, from 63488, become infinite.
    """
    return (values.float() * scales[..., None]).to(dtype)


def _by_triton(*args: Any, launch: Gemm | None = None) -> torch.Tensor:
    from fastsd.kernels.triton import linear_fp8 as linear_fp8_triton

    return functools.partial(linear_fp8_triton.linear_fp8, launch=launch)(*args)


def _launches(
    thorough: bool,
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    residual: torch.Tensor | None,
    skip: torch.Tensor | None,
) -> list[Gemm]:
    rows, (columns, depth) = x[..., 0].numel(), weight.shape
    return variants.products(thorough, architecture.class_of(x.device), rows, columns, depth, 0, weight.element_size())


def product_by_cublaslt(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, skip: torch.Tensor | None
) -> torch.Tensor:
    """Quantised `cat([x, skip])` times `(weight scale)^T`, and `bias`, by PyTorch's product of fp8."""
    from fastsd.kernels.triton import linear_fp8 as linear_fp8_triton

    values, scales = linear_fp8_triton.quantize(x, skip)
    y = torch._scaled_mm(
        values.flatten(0, -2), weight.T, scales.view(-1, 1), scale.view(1, -1), bias, out_dtype=x.dtype
    )
    return y.view(*x.shape[:-1], -1)


def _by_cublaslt(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    residual: torch.Tensor | None,
    skip: torch.Tensor | None,
) -> torch.Tensor:
    y = activate(product_by_cublaslt(x, weight, scale, bias, skip), activation)
    return y if residual is None else y + residual


def _by_16_bits(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    residual: torch.Tensor | None,
    skip: torch.Tensor | None,
) -> torch.Tensor:
    """The product of the same numbers in the dtype of `x`, which PyTorch computes everywhere."""
    x = x if skip is None else torch.cat([x, skip], dim=-1)
    rows, matrix = dequantized(*quantize(x), x.dtype), dequantized(weight, scale, x.dtype)
    y = activate(F.linear(rows, matrix, bias), activation)
    return y if residual is None else y + residual


def _refused_by_triton(*args: Any) -> str | None:
    from fastsd.kernels.triton import linear_fp8 as linear_fp8_triton

    return linear_fp8_triton.refuses(*args)


OP = GpuOp(
    "linear_fp8",
    linear_fp8_ref,
    (
        OpCandidate("triton", _by_triton, _refused_by_triton, partial=True, launches=_launches, launch_types=(Gemm,)),
        OpCandidate("cublaslt", _by_cublaslt, _refused_by_triton, measured=True),
        OpCandidate("torch", _by_16_bits),
    ),
)
