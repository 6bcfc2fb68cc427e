"""`conv2d` of fp8 operands (e4m3): weights quantised at load, with a scale for each output channel; maps as they come.

A pixel is read under every position of the kernel, so a map has one scale for all its pixels. It is a power of two, as
the scales of `fastsd.kernels.linear_fp8`, and costs as little: numbers down to 2^-13 of the largest keep their 4
significant bits.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from fastsd.kernels import candidates, dispatch
from fastsd.kernels.candidates import GpuOp, OpCandidate
from fastsd.kernels.conv2d import Padding, by_torch, conv2d, conv2d_ref, size_of
from fastsd.kernels.launch import architecture, variants
from fastsd.kernels.launch.conv2d import ConvBoxes, ConvPointers
from fastsd.kernels.linear_fp8 import dequantized, quantize


def quantize_maps(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`x` `[B, ...]` as e4m3 values with one scale for each of the B; see `quantize`. Returns `[B, ...]` and `[B]`."""
    values, scales = quantize(x.flatten(1))
    return values.view(x.shape), scales


def dequantized_maps(values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Values `[B, ...]` times the scales `[B]`; exact as `dequantized`."""
    return dequantized(values.flatten(1), scales, dtype).view(values.shape)


def conv2d_fp8_ref(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int = 1,
    padding: Padding = (0, 0, 0, 0),
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """The specification of `conv2d_fp8`: quantised maps, products and sums in fp32, rounded once."""
    values, scales = quantize_maps(x)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = conv2d_ref(values.to(wide), weight.to(wide), None, stride, padding) * scales[:, None, None, None] * scale
    if bias is not None:
        y = y + bias
    return (y if residual is None else y + residual).to(x.dtype)


def conv2d_fp8(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int = 1,
    padding: Padding = (0, 0, 0, 0),
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """`conv(quantized(x), weight scale) + bias + residual`.

    On a CPU the specification computes it: the same numbers, slowly.

    Args:
        x: `[B, H, W, Cin]` in 16 bits or fp32.
        weight: `[Cout, Cin, kh, kw]` e4m3 in channels-last memory; scale: `[Cout]` fp32, see `quantize_maps`.
        bias, stride, padding, residual: as of `fastsd.kernels.conv2d.conv2d`, in the dtype of `x`.

    Returns:
        `[B, H', W', Cout]` in the dtype of `x`.
    """
    arguments = x, weight, scale, bias, stride, padding, residual
    return candidates.run(OP, *arguments) if dispatch.backend(x, bias) == "triton" else conv2d_fp8_ref(*arguments)


def _by_triton(*args: Any, launch: ConvBoxes | ConvPointers | None = None) -> torch.Tensor:
    from fastsd.kernels.triton import conv2d_fp8 as conv2d_fp8_triton

    return functools.partial(conv2d_fp8_triton.conv2d_fp8, launch=launch)(*args)


def _launches(
    thorough: bool,
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    stride: int,
    padding: Padding,
    *_: Any,
) -> list[ConvBoxes | ConvPointers]:
    outputs, inputs, *kernel = weight.shape
    size, key = size_of(x.shape, weight, stride, padding), architecture.class_of(x.device)
    sizes = (*size, inputs, outputs, math.prod(kernel), stride, 1, weight.element_size())
    return variants.convolutions(thorough, key, *sizes)


def _refused_by_triton(*args: Any) -> str | None:
    from fastsd.kernels.triton import conv2d_fp8 as conv2d_fp8_triton

    return conv2d_fp8_triton.refusal(*args)


def _in_16_bits(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Map and weight rounded to fp8, in the dtype of `x`."""
    # The order of the weight's memory is kept: its channels come last.
    taps = dequantized_maps(weight.permute(0, 2, 3, 1), scale, x.dtype).permute(0, 3, 1, 2)
    return dequantized_maps(*quantize_maps(x), x.dtype), taps


def _by_16_bits(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    stride: int,
    padding: Padding,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """The convolution of the same numbers in the dtype of `x`, by its own choice."""
    return conv2d(*_in_16_bits(x, weight, scale), bias, stride, padding, residual)


def _by_torch(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    stride: int,
    padding: Padding,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """The same by PyTorch alone, which has no convolution of fp8."""
    return by_torch(*_in_16_bits(x, weight, scale), bias, stride, padding, residual)


OP = GpuOp(
    "conv2d_fp8",
    conv2d_fp8_ref,
    (
        OpCandidate(
            "triton",
            _by_triton,
            _refused_by_triton,
            partial=True,
            launches=_launches,
            launch_types=(ConvBoxes, ConvPointers),
        ),
        OpCandidate("16 bits", _by_16_bits),
        OpCandidate("torch", _by_torch),
    ),
)
