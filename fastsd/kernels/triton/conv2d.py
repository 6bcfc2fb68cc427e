"""`conv2d` on the GPU as an implicit product: pixels x (taps x input channels) by weights, in one launch.

The map of taps is never written. Sums are fp32, in one order for a launch; bias, residual and activation are added to
them before they are rounded. Where few pixels leave multiprocessors without a program, the taps and channels are split
between programs, and a second launch adds their parts.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from fastsd.kernels import dispatch
from fastsd.kernels.launch import OPTIONS, architecture
from fastsd.kernels.launch.conv2d import OFFSETS, UNUSED, ConvBoxes, ConvPointers, choose, widest_offset
from fastsd.kernels.launch.linear import EXACT
from fastsd.kernels.triton.conv2d_pointers import _conv2d_pointers_kernel
from fastsd.kernels.triton.conv2d_tiles import _conv2d_sum_kernel
from fastsd.kernels.triton.conv2d_tma import _conv2d_tma_kernel

# Triton's interpreter multiplies the bits of bf16 values as integers.
DTYPES = (torch.float16, *(() if dispatch.interpreted() else (torch.bfloat16,)))
ACTIVATIONS = ("none", "relu", "silu")
SUM_BLOCK = 1024  # elements of a program of the last launch of a split

Padding = tuple[int, int, int, int]  # left, right, top, bottom


class Convolution(NamedTuple):
    """One call that the kernels take.

    Attributes:
        x: `[B, H, W, C]`; weight: `[phases, N, kh, kw, C]`; both in fp8 if there are `scales`.
        dtype: of the result, bias and residual.
        size: rows and columns of the result, or of each of its phases.
        corner: rows and columns of zeros above and left of the map.
        scales: of fp8 operands, `[B]` and `[N]` fp32.
    """

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    residual: torch.Tensor | None
    activation: str
    size: tuple[int, int]
    stride: int
    corner: tuple[int, int]
    dtype: torch.dtype
    scales: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)

    @property
    def up(self) -> int:
        return math.isqrt(len(self.weight))

    def run(self, launch: ConvBoxes | ConvPointers | None) -> torch.Tensor:
        phases, outputs, kh, kw, inputs = self.weight.shape
        (height, width), x = self.size, self.x
        out = torch.empty(len(x), self.up * height, self.up * width, outputs, dtype=self.dtype, device=x.device)
        if out.numel() == 0:
            return out
        key = (height, width, inputs, outputs, kh * kw, self.stride, phases, x.element_size())
        launch = launch or choose(architecture.class_of(x.device), *key)
        if isinstance(launch, ConvBoxes) and not all(map(_aligned, (x, self.weight))):
            launch = launch.by_address()
        split = launch.split
        parts = out if split == 1 else torch.empty(split, *out.shape, dtype=torch.float32, device=x.device)
        with torch.cuda.device_of(x):
            unsplit = self if split == 1 else self._replace(bias=None, residual=None)
            if isinstance(launch, ConvBoxes):
                unsplit._by_boxes(launch, parts)
            else:
                unsplit._by_pointers(launch, parts)
            if split > 1:
                _conv2d_sum_kernel[(-(-out.numel() // SUM_BLOCK),)](
                    *(parts, self.bias, self.residual, out, out.numel()),
                    N=outputs,
                    SPLITS=split,
                    ACTIVATION=self.activation,
                    BLOCK=SUM_BLOCK,
                    num_warps=4,
                    **OPTIONS,
                )
        return out

    def _by_boxes(self, launch: ConvBoxes, out: torch.Tensor) -> None:
        phases, outputs, kh, kw, inputs = self.weight.shape
        images, rows, columns = launch.box
        tiles = -(-len(self.x) // images) * -(-self.size[0] // rows) * -(-self.size[1] // columns)
        matrix = self.weight.view(phases * outputs, kh * kw * inputs)
        first, second = (
            TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [part, launch.depth]) if part else None
            for part in launch.channels
        )
        x = TensorDescriptor(self.x, list(self.x.shape), list(self.x.stride()), [*launch.box, launch.depth])
        _conv2d_tma_kernel[(tiles * -(-outputs // sum(launch.channels)), phases, launch.split)](
            *(x, first, second, self.bias, self.residual, *self.scales, out, len(self.x), *self.size, *self.corner),
            **self._constants(launch),
            IMAGES=images,
            ROWS=rows,
            COLUMNS=columns,
            N1=launch.channels[0],
            N2=launch.channels[1],
            SWAPPED=launch.swapped,
        )

    def _by_pointers(self, launch: ConvPointers, out: torch.Tensor) -> None:
        phases, outputs = self.weight.shape[:2]
        batch, height, width, _ = self.x.shape
        tiles = -(-batch * self.size[0] * self.size[1] // launch.pixels) * -(-outputs // launch.channels)
        _conv2d_pointers_kernel[(tiles, phases, launch.split)](
            *(self.x, self.weight, self.bias, self.residual, *self.scales, out),
            *(batch, height, width, *self.size, *self.corner),
            **self._constants(launch),
            STRIDE=self.stride,
            BM=launch.pixels,
            BN=launch.channels,
        )

    def _constants(self, launch: ConvBoxes | ConvPointers) -> dict[str, int | str | bool | None]:
        _, outputs, kh, kw, inputs = self.weight.shape
        sizes = {"C": inputs, "N": outputs, "KH": kh, "KW": kw, "UP": self.up, "BK": launch.depth}
        options = {"SPLITS": launch.split, "num_warps": launch.warps, "num_stages": launch.stages}
        exact = EXACT.get(architecture.class_of(self.x.device)) if self.x.element_size() == 1 else None
        sums = {"EXACT": None if exact is None else min(exact, launch.depth)}
        return {**sizes, **sums, **options, "ACTIVATION": self.activation, **OPTIONS}


def conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int = 1,
    padding: Padding = (0, 0, 0, 0),
    residual: torch.Tensor | None = None,
    activation: str = "none",
    launch: ConvBoxes | ConvPointers | None = None,
) -> torch.Tensor:
    """`activation(conv(x, weight) + bias + residual)`; see `fastsd.kernels.conv2d` for the specification.

    Args:
        x: `[B, H, W, C]` contiguous, fp16 or bf16.
        weight: `[N, C, kh, kw]` in channels-last memory; finite.
        bias: `[N]`.
        stride: of both directions.
        padding: zeros added at (left, right, top, bottom).
        residual: `[B, H', W', N]` contiguous.
        activation: "none", "relu" or "silu".
        launch: overrides the launch table.

    Returns:
        `[B, H', W', N]` contiguous, in the dtype of `x`. An image's result does not depend on the others in its batch.

    Raises:
        ValueError: the reason of `refusal`.
    """
    reason = refusal(x, weight, bias, stride, padding, residual, activation)
    if reason is not None:
        raise ValueError(f"conv2d: {reason}")
    taps = weight.permute(0, 2, 3, 1)[None]
    corner, size = (padding[2], padding[0]), size_of(x, weight, stride, padding)
    return Convolution(x, taps, bias, residual, activation, size, stride, corner, x.dtype).run(launch)


def refusal(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int = 1,
    padding: Padding = (0, 0, 0, 0),
    residual: torch.Tensor | None = None,
    activation: str = "none",
) -> str | None:
    """Why the kernels do not take this call, and what they take; None if they take it."""
    unused = UNUSED.get(architecture.class_of(x.device))
    if unused is not None:
        return unused
    given = {"x": x, "weight": weight, "bias": bias, "residual": residual}
    tensors = {name: t for name, t in given.items() if t is not None}
    for name, t in tensors.items():
        if t.dtype not in DTYPES or t.dtype != x.dtype:
            names = " or ".join(str(dtype)[6:] for dtype in DTYPES)
            return f"{name} is {str(t.dtype)[6:]}; the kernel takes {names} for all tensors"
    if activation not in ACTIVATIONS:
        return f"activation {activation!r}; it must be {', '.join(ACTIVATIONS)}"
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors.values()):
        return "the kernel has no gradients; use the torch backend for training"
    return misplaced(x, weight, bias, stride, padding, residual)


def misplaced(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: int,
    padding: Padding,
    residual: torch.Tensor | None,
) -> str | None:
    """Why the kernels cannot read or write these tensors: their sizes, or where they are in memory."""
    if x.ndim != 4 or weight.ndim != 4 or weight.shape[1] != x.shape[3]:
        return f"x is {list(x.shape)}, weight is {list(weight.shape)}; they need [B, H, W, C] and [N, C, kh, kw]"
    size = size_of(x, weight, stride, padding)
    result = [len(x), *size, len(weight)]
    if min(size) < 1 or not weight.numel():
        return f"the result is {result}; it needs a pixel and a channel"
    if len(x) * max(size[0] * size[1] * 4, x.shape[1] * x.shape[2]) >= 2**31:
        return f"x is {list(x.shape)}; the kernel counts fewer than 2^31 pixels"
    taps = weight.shape[2], weight.shape[3]
    if widest_offset(*x.shape[:3], size, x.shape[3], len(weight), taps, stride) >= OFFSETS:
        return f"x is {list(x.shape)}, the result {result}; a tile may span fewer than 2^31 elements of either"
    if bias is not None and (list(bias.shape) != result[3:] or bias.stride(0) != 1):
        return f"bias is {list(bias.shape)}; it needs [{len(weight)}], contiguous"
    if residual is not None and list(residual.shape) != result:
        return f"residual is {list(residual.shape)}; it needs the shape of the result, {result}"
    for name, t in (("x", x), ("residual", residual)):
        if t is not None and not t.is_contiguous():
            return f"{name} {list(t.shape)} has strides {list(t.stride())}; the kernel needs it contiguous"
    if not weight.is_contiguous(memory_format=torch.channels_last):
        return f"weight has strides {list(weight.stride())}; the kernel needs channels-last memory"
    return None


def _aligned(x: torch.Tensor) -> bool:
    """Whether the copy engine can read `x`: it begins at a multiple of 16 bytes."""
    return x.storage_offset() * x.element_size() % 16 == 0


def size_of(x: torch.Tensor, weight: torch.Tensor, stride: int, padding: Padding) -> tuple[int, int]:
    """Rows and columns of the result."""
    left, right, top, bottom = padding
    height, width = x.shape[1] + top + bottom - weight.shape[2], x.shape[2] + left + right - weight.shape[3]
    return height // stride + 1, width // stride + 1
