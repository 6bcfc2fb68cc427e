"""Convolutions of channels-last maps, with an epilogue: bias, residual, ReLU."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from fastsd.kernels import candidates, dispatch
from fastsd.kernels.candidates import GpuOp, OpCandidate
from fastsd.kernels.cpu import choices, onednn, winograd
from fastsd.kernels.launch import architecture, variants
from fastsd.kernels.launch.conv2d import UNUSED, ConvBoxes, ConvPointers, choose, saves_time

Padding = tuple[int, int, int, int]  # left, right, top, bottom
VECTOR = 8  # channels that cuDNN's channels-last kernels read at a time, in 16 bits


def conv2d_ref(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: int = 1,
    padding: Padding = (0, 0, 0, 0),
    residual: torch.Tensor | None = None,
    relu: bool = False,
) -> torch.Tensor:
    """The specification of `conv2d`: fp32, zero padding made explicit."""
    padded = F.pad(dispatch.widen(x).permute(0, 3, 1, 2), padding)
    wide_bias = None if bias is None else dispatch.widen(bias)
    y = F.conv2d(padded, dispatch.widen(onednn.dense(weight)), wide_bias, stride).permute(0, 2, 3, 1)
    y = y if residual is None else y + residual
    return (y.clamp(min=0) if relu else y).to(x.dtype)


def conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: int = 1,
    padding: Padding = (0, 0, 0, 0),
    residual: torch.Tensor | None = None,
    relu: bool = False,
) -> torch.Tensor:
    """Cross-correlate `x` with `weight`, add `bias` and `residual`; with `relu`, then clamp at zero.

    Args:
        x: `[B, H, W, Cin]`.
        weight: `[Cout, Cin, kh, kw]`, fastest if packed (`onednn.pack`) where `wants_packed`, else in
            `torch.channels_last` memory.
        bias: `[Cout]` or None.
        stride: of both directions.
        padding: zeros added at (left, right, top, bottom).
        residual: `[B, H', W', Cout]`.

    Returns:
        `[B, H', W', Cout]` in the dtype of `x`.
    """
    backend = dispatch.backend(x, weight, bias, residual)
    if backend == "reference":
        return conv2d_ref(x, weight, bias, stride, padding, residual, relu)
    if backend == "triton":
        return candidates.run(OP, x, weight, bias, stride, padding, residual, relu)
    if backend == "torch":
        return by_torch(x, weight, bias, stride, padding, residual, relu)
    if not (weight.is_mkldnn or wants_packed(x.shape, weight, stride, padding)):
        return winograd.convolve(x, weight, bias, padding, residual, relu)
    x, (top, left) = _padded(x, padding)
    x = x.contiguous(memory_format=torch.channels_last)
    if residual is not None:
        residual = residual.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    return onednn.convolve(x, weight, bias, stride, (top, left), residual, relu).permute(0, 2, 3, 1)


def wants_packed(shape: torch.Size, weight: torch.Tensor, stride: int, padding: Padding) -> bool:
    """Whether oneDNN's convolution, which a packed weight has, is faster for `x` of this shape than Winograd's.

    Winograd's sums cost as much for each channel, and for each element of the weight, as some products.
    """
    if not winograd.takes(weight, stride):
        return True
    outputs, inputs = weight.shape[:2]
    mean = 2 * inputs * outputs // (inputs + outputs)
    height, width = size_of(shape, weight, stride, padding)
    return choices.way("conv2d", weight.dtype, min(mean, height * width // 3)) == "direct"


def _padded(x: torch.Tensor, padding: Padding) -> tuple[torch.Tensor, tuple[int, int]]:
    """`x` as `[B, Cin, H, W]`, padded where the sides differ; the rows and columns that are left to the convolution."""
    left, right, top, bottom = padding
    x = x.permute(0, 3, 1, 2)
    return (x, (top, left)) if (left, top) == (right, bottom) else (F.pad(x, padding), (0, 0))


def by_torch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: int,
    padding: Padding,
    residual: torch.Tensor | None,
    relu: bool = False,
) -> torch.Tensor:
    """`conv2d` by PyTorch's own operations."""
    x, (top, left) = _padded(x, padding)
    y = F.conv2d(x, onednn.dense(weight), bias, stride, (top, left)).permute(0, 2, 3, 1)
    y = y if residual is None else y + residual
    return y.relu_() if relu else y


def _by_cudnn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: int,
    padding: Padding,
    residual: torch.Tensor | None,
    relu: bool,
) -> torch.Tensor:
    """By the plan that cuDNN measured to be the fastest (`fastsd.cuda.cudnn`), and one pass in place for all that
    follows. PyTorch would add the bias in one pass and the residual in another.
    """
    y = by_torch(*_whole_vectors(x, weight), None, stride, padding, None, False)[..., : len(weight)]
    return _finished(y, bias, residual, relu)


def _finished(y: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None, relu: bool) -> torch.Tensor:
    """What follows the products, in one pass in place."""
    from fastsd.kernels.triton.add_bias_residual import add_bias_residual

    if bias is None and residual is None and not relu:
        return y.contiguous()
    return add_bias_residual(y.contiguous(), bias, None if residual is None else residual.contiguous(), relu)


def _by_first_plan(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: int,
    padding: Padding,
    residual: torch.Tensor | None,
    relu: bool,
) -> torch.Tensor:
    """By the first plan of cuDNN's heuristics that sums in a fixed order. Its own search runs each plan once or twice
    and may miss the best; this one is timed as all candidates are.
    """
    inputs, weights = _whole_vectors(x, weight)
    inputs, corner = _padded(inputs, padding)
    tf32 = torch.backends.cudnn.allow_tf32
    search, fixed_order, one = False, True, [1, 1]
    convolution = torch.ops.aten.cudnn_convolution
    y = convolution(inputs, weights, list(corner), [stride] * 2, one, 1, search, fixed_order, tf32)
    return _finished(y.permute(0, 2, 3, 1)[..., : len(weight)], bias, residual, relu)


def _whole_vectors(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`x` and `weight` with channels padded by zeros to multiples of 8: in 16 bits cuDNN's channels-last kernels read
    8 at a time, and other counts (latents, images) may fall to slow ones.

    Padded in each call: a kept copy would not follow a weight that changes in place under a captured graph.
    """
    outputs, inputs = -len(weight) % VECTOR, -x.shape[3] % VECTOR
    if x.element_size() != 2 or not (outputs or inputs):
        return x, weight
    padded = F.pad(weight, (0, 0, 0, 0, 0, inputs, 0, outputs)).contiguous(memory_format=torch.channels_last)
    return F.pad(x, (0, inputs)) if inputs else x, padded


def _by_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: int,
    padding: Padding,
    residual: torch.Tensor | None,
    relu: bool,
    launch: ConvBoxes | ConvPointers | None = None,
) -> torch.Tensor:
    from fastsd.kernels.triton import conv2d as conv2d_triton

    return conv2d_triton.conv2d(x, weight, bias, stride, padding, residual, "relu" if relu else "none", launch)


def _launches(
    thorough: bool,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: int,
    padding: Padding,
    *_: Any,
) -> list[ConvBoxes | ConvPointers]:
    height, width = size_of(x.shape, weight, stride, padding)
    outputs, inputs, *kernel = weight.shape
    key = architecture.class_of(x.device)
    return variants.convolutions(thorough, key, height, width, inputs, outputs, math.prod(kernel), stride, 1)


def size_of(shape: torch.Size, weight: torch.Tensor, stride: int, padding: Padding) -> tuple[int, int]:
    """Height and width of the result for `x` of this shape."""
    left, right, top, bottom = padding
    kernel = weight.shape[2:]
    height, width = ((n - k) // stride + 1 for n, k in zip((shape[1] + top + bottom, shape[2] + left + right), kernel))
    return height, width


def _no_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: int,
    padding: Padding,
    residual: torch.Tensor | None,
    relu: bool,
) -> str | None:
    from fastsd.kernels.triton import conv2d as conv2d_triton

    return conv2d_triton.refusal(x, weight, bias, stride, padding, residual)


def _first(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: int,
    padding: Padding,
    residual: torch.Tensor | None,
    relu: bool,
) -> str | None:
    """Our kernel where channels are few, since cuDNN needs padded copies, or where an estimate says so."""
    outputs, inputs, *kernel = weight.shape
    if x.element_size() != 2:
        return None
    if inputs % VECTOR or outputs % VECTOR:
        return "triton"
    left, right, top, bottom = padding
    height, width = size_of(x.shape, weight, stride, padding)
    passes = 0.0 if bias is None and residual is None and not relu else 2.0 if residual is None else 3.0
    if (left, top) != (right, bottom):  # cuDNN needs a padded copy
        passes += 2 * stride**2 * inputs / outputs
    taps, key = math.prod(kernel), architecture.class_of(x.device)
    if key in UNUSED:
        return None
    launch = choose(key, height, width, inputs, outputs, taps, stride, 1)
    ours = saves_time(key, height * width, inputs, outputs, taps, launch.split, passes)
    return "triton" if ours else None


OP = GpuOp(
    "conv2d",
    conv2d_ref,
    (
        OpCandidate("cudnn", _by_cudnn),
        OpCandidate(
            "triton",
            _by_triton,
            _no_triton,
            partial=True,
            launches=_launches,
            launch_types=(ConvBoxes, ConvPointers),
        ),
        OpCandidate("cudnn, first plan", _by_first_plan, measured=True, tuned=True),
        OpCandidate("torch", by_torch),
    ),
    first=_first,
)
