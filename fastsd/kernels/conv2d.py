"""Convolutions of channels-last maps, with an epilogue: bias, residual, ReLU."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastsd.kernels import candidates, dispatch
from fastsd.kernels.candidates import GpuOp, OpCandidate
from fastsd.kernels.cpu import onednn

Padding = tuple[int, int, int, int]  # left, right, top, bottom


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
        weight: `[Cout, Cin, kh, kw]`, fastest if packed (`onednn.pack`) or in `torch.channels_last` memory.
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
        return _by_torch(x, weight, bias, stride, padding, residual, relu)
    x, (top, left) = _padded(x, padding)
    x = x.contiguous(memory_format=torch.channels_last)
    if residual is not None:
        residual = residual.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    return onednn.convolve(x, weight, bias, stride, (top, left), residual, relu).permute(0, 2, 3, 1)


def _padded(x: torch.Tensor, padding: Padding) -> tuple[torch.Tensor, tuple[int, int]]:
    """`x` as `[B, Cin, H, W]`, padded where the sides differ; the rows and columns that are left to the convolution."""
    left, right, top, bottom = padding
    x = x.permute(0, 3, 1, 2)
    return (x, (top, left)) if (left, top) == (right, bottom) else (F.pad(x, padding), (0, 0))


def _by_torch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: int,
    padding: Padding,
    residual: torch.Tensor | None,
    relu: bool,
) -> torch.Tensor:
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
    """By cuDNN, which chooses among its own plans, and one pass in place for all that follows.

    PyTorch would add the bias in one pass and the residual in another.
    """
    from fastsd.kernels.triton.add_bias_residual import add_bias_residual

    y = _by_torch(x, weight, None, stride, padding, None, False)
    if bias is None and residual is None and not relu:
        return y
    return add_bias_residual(y.contiguous(), bias, None if residual is None else residual.contiguous(), relu)


OP = GpuOp("conv2d", conv2d_ref, (OpCandidate("cudnn", _by_cudnn), OpCandidate("torch", _by_torch)))
