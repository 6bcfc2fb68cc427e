"""oneDNN through the entry points of PyTorch's compiler: fused epilogues, and weights in blocked memory.

`F.conv2d` reorders the weights into oneDNN's blocked layout in every call, which at low resolutions costs more than the
convolution; `pack` does it once. A packed weight is an opaque tensor (`is_mkldnn`) of the same shape and dtype, from
which `dense` restores the ordinary one. Changing it in place by an ordinary tensor raises, so no change is missed.
Matrix products gain 3 to 5% from packing and are not packed.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any

import torch

from fastsd.kernels import dispatch

# Epilogues that oneDNN has, as (its name, algorithm); computed in fp32 before the result is rounded.
ACTIVATIONS = {"none": ("none", ""), "silu": ("swish", ""), "gelu": ("gelu", "none"), "sigmoid": ("sigmoid", "")}
TRANSPOSED = ([1, 1], [0, 0], [2, 2], [1, 1])  # padding, further padding of the result, stride, dilation


def pack(weight: torch.Tensor, shape: torch.Size, stride: int, padding: tuple[int, int, int, int]) -> torch.Tensor:
    """A convolution's weight `[Cout, Cin, kh, kw]` in the blocked layout that oneDNN chooses for an input.

    If oneDNN does not compute in its dtype on this processor, `weight` itself.

    Args:
        weight: an ordinary tensor.
        shape: `[B, H, W, Cin]` of the input.
        stride: of both directions.
        padding: zeros at (left, right, top, bottom).
    """
    if weight.dtype not in dispatch.onednn_dtypes() or weight.numel() == 0 or shape.numel() == 0:
        return weight
    left, right, top, bottom = padding
    batch, height, width, channels = shape
    if (left, top) != (right, bottom):  # `conv2d` pads such maps before the convolution
        height, width, left, top = height + top + bottom, width + left + right, 0, 0
    size = [batch, channels, height, width]
    blocked = weight.detach().contiguous().to_mkldnn()
    return torch.ops.aten.mkldnn_reorder_conv2d_weight(blocked, [top, left], [stride] * 2, [1, 1], 1, size)


def dense(weight: torch.Tensor) -> torch.Tensor:
    """An ordinary tensor with the values of `weight`; `weight` itself if it is ordinary. Differentiable."""
    return weight.to_dense() if weight.is_mkldnn else weight


def layout(weight: torch.Tensor) -> Hashable:
    """How the elements of a weight lie in memory, packed or not: equal for weights of one shape and one layout."""
    if not weight.is_mkldnn:
        return weight.stride()
    return torch.ops.mkldnn._get_mkldnn_serialized_md(weight.detach()).numpy().tobytes()


def convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: int,
    padding: tuple[int, int],
    residual: torch.Tensor | None,
    relu: bool = False,
) -> torch.Tensor:
    """`conv(x) + bias + residual`, with `relu` then clamped at zero.

    In fp32 a pass over the result adds the residual in less time than the epilogue (measured); in 16 bits the epilogue
    rounds once instead of twice.

    x: `[B, Cin, H, W]`; residual: `[B, Cout, H', W']`; both in channels-last memory.
    """
    shape = (padding, (stride, stride), (1, 1), 1)
    convolution, convolution_and_sum, *_ = _operators()
    if residual is None:
        return convolution(x, weight, bias, *shape, "relu" if relu else "none", [], "")
    if x.dtype == torch.float32 and not relu:
        return convolution(x, weight, bias, *shape, "none", [], "").add_(residual)
    return convolution_and_sum(x, residual, weight, bias, *shape, "add", 1.0, "relu" if relu else None, [], None)


def pack_transposed(weight: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """`convolve_transposed`'s weight in the blocked layout that oneDNN chooses for one map `[H, W, Cin]`."""
    height, width, channels = shape
    padding, extra, stride, dilation = TRANSPOSED
    size = [1, channels, height, width]
    return torch.ops.mkldnn._reorder_convolution_transpose_weight(weight, padding, extra, stride, dilation, 1, size)


def convolve_transposed(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The transposed convolution of stride 2 that doubles a map: pixel i adds to rows 2i - 1 to 2i + 2 of the result.

    x: `[B, Cin, H, W]` in channels-last memory; weight: `[Cin, Cout, 4, 4]`; result: `[B, Cout, 2H, 2W]`.
    """
    return _operators()[3](x, weight, bias, *TRANSPOSED, 1, "none", [], "")


def pack_products(weights: torch.Tensor, rows: int) -> torch.Tensor:
    """Weights `[G, N, K]` of G products in the blocked layout that oneDNN chooses for `rows` rows; see `products`."""
    groups, outputs, inputs = weights.shape
    blocked = weights.reshape(groups * outputs, inputs, 1, 1).to_mkldnn()
    size = [1, groups * inputs, rows, 1]
    return torch.ops.aten.mkldnn_reorder_conv2d_weight(blocked, [0, 0], [1, 1], [1, 1], groups, size)


def products(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """G products in one call, `x[:, g] weights[g]^T + bias`: `[M, G, K]` to `[M, G * N]`; bias: `[G * N]`."""
    rows, groups, inputs = x.shape
    pixels = x.view(1, rows, 1, groups * inputs).permute(0, 3, 1, 2)
    y = _operators()[0](pixels, packed, bias, (0, 0), (1, 1), (1, 1), groups, "none", [], "")
    return y.permute(0, 2, 3, 1).reshape(rows, -1)


def matmul(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str = "none") -> torch.Tensor:
    """`activation(x weight^T + bias)` for `x` `[M, K]`, `weight` `[N, K]` and an activation of `ACTIVATIONS`.

    A row of the result does not depend on the number of rows: oneDNN sums a single row in a different order, so a
    single row is computed as two.
    """
    if len(x) == 1:
        return matmul(x.expand(2, -1).contiguous(), weight, bias, activation)[:1]
    name, algorithm = ACTIVATIONS[activation]
    return _operators()[2](x, weight, bias, name, [], algorithm)


@functools.cache
def _operators() -> tuple[Any, Any, Any, Any]:
    """PyTorch's operators, found once because finding them takes 2 µs.

    They are a convolution, one plus a map, a product, and a transposed convolution.
    """
    ops = torch.ops.mkldnn
    convolution, transposed = ops._convolution_pointwise, ops._convolution_transpose_pointwise
    return convolution.default, convolution.binary, ops._linear_pointwise.default, transposed.default
