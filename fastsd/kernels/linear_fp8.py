"""`linear` of fp8 operands (e4m3): weights quantised at load, rows of the activation as they come.

A scale is a power of two, so that dividing and multiplying by it is exact: every device quantises to the same bits.
Since e4m3 is a floating-point format, a finer scale would gain nothing but a binade at the bottom of 15.
"""

from __future__ import annotations

from typing import Any

import torch

from fastsd.kernels import candidates, dispatch
from fastsd.kernels.candidates import GpuOp, OpCandidate
from fastsd.kernels.linear import activate

FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3


def row_scales(x: torch.Tensor) -> torch.Tensor:
    """The smallest power of two s with max|x| / s <= 448, for each row of `x` `[..., K]`. Returns `[...]` fp32.

    It is 2^k between the limits of normal fp32 numbers; k follows from the bits of max|x|: 448 = 1.75 * 2^8.
    """
    bits = x.abs().amax(dim=-1).float().view(torch.int32)
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

    Where no kernel of ours runs, the specification does: the same numbers, slowly.

    Args:
        x: `[..., K1]` in 16 bits or fp32.
        weight: `[N, K]` e4m3, K = K1 or, with `skip`, K1 + K2; scale: `[N]` fp32, see `quantize`.
        bias, activation, residual, skip: as of `fastsd.kernels.linear.linear`, in the dtype of `x`.

    Returns:
        `[..., N]` in the dtype of `x`.
    """
    arguments = x, weight, scale, bias, activation, residual, skip
    return candidates.run(OP, *arguments) if dispatch.backend(x, bias) == "triton" else linear_fp8_ref(*arguments)


def _by_triton(*args: Any) -> torch.Tensor:
    from fastsd.kernels.triton import linear_fp8 as linear_fp8_triton

    return linear_fp8_triton.linear_fp8(*args)


def _refused_by_triton(*args: Any) -> str | None:
    from fastsd.kernels.triton import linear_fp8 as linear_fp8_triton

    return linear_fp8_triton.refuses(*args)


OP = GpuOp(
    "linear_fp8",
    linear_fp8_ref,
    (OpCandidate("triton", _by_triton, _refused_by_triton, partial=True), OpCandidate("torch", linear_fp8_ref)),
)
