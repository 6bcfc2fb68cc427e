"""`conv2d_fp8` on the GPU: two launches quantise the maps, a third one convolves (`fastsd.kernels.triton.conv2d`).

The largest value of a map is known only when all of it was read. So one launch writes the largest of each of its parts;
the next one's programs reduce these few numbers again, each for itself, and read the map once more, from the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastsd.kernels.launch import OPTIONS
from fastsd.kernels.launch.conv2d import ConvBoxes, ConvPointers
from fastsd.kernels.launch.linear import UNIT_FP8 as UNIT
from fastsd.kernels.triton.conv2d import Convolution, Padding, misplaced, size_of
from fastsd.kernels.triton.linear_fp8 import FP8, not_here, rounded, scale_of

BLOCK = 4096  # elements that a program holds at a time
MOST = 256  # parts of a map, about two for each multiprocessor


@triton.jit(do_not_specialize=["size", "blocks"])
def _largest_of_parts_kernel(
    x_ptr,  # [B, size]
    largest_ptr,  # [B, parts] int32
    size,  # of a map, in units of 16 elements
    blocks,  # of a part
    BLOCK: tl.constexpr,
):
    """The bits of the largest absolute value of each part, as fp32; of one that is no number those of infinity."""
    part, image = tl.program_id(0), tl.program_id(1)
    size = size.to(tl.int64) * 16
    first = part.to(tl.int64) * blocks * BLOCK
    x_ptr += image * size + first
    lane = tl.arange(0, BLOCK)
    largest = tl.zeros([BLOCK], tl.int32)
    for k in range(0, blocks * BLOCK, BLOCK):
        x = tl.load(x_ptr + k + lane, mask=first + k + lane < size, other=0.0)
        largest = tl.maximum(largest, tl.abs(x.to(tl.float32)).to(tl.int32, bitcast=True))
    tl.store(largest_ptr + image * tl.num_programs(0) + part, tl.minimum(tl.max(largest, 0), 0x7F800000))


@triton.jit(do_not_specialize=["size", "blocks"])
def _quantize_maps_kernel(
    x_ptr,  # [B, size]
    largest_ptr,  # [B, parts] int32
    out_ptr,  # [B, size] e4m3
    scale_ptr,  # [B] fp32
    size,  # of a map, in units of 16 elements
    blocks,  # of a part
    BLOCK: tl.constexpr,
    MOST: tl.constexpr,
):
    """`fastsd.kernels.conv2d_fp8.quantize_maps`, of a part of a map by each program."""
    part, image, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    size = size.to(tl.int64) * 16
    first = part.to(tl.int64) * blocks * BLOCK
    x_ptr += image * size + first
    out_ptr += image * size + first
    number = tl.arange(0, MOST)
    largest = tl.load(largest_ptr + image * parts + number, mask=number < parts, other=0)
    scale, inverse = scale_of(tl.max(largest, 0))
    tl.store(scale_ptr + image, scale, mask=part == 0)
    lane = tl.arange(0, BLOCK)
    for k in range(0, blocks * BLOCK, BLOCK):
        within = first + k + lane < size
        x = tl.load(x_ptr + k + lane, mask=within, other=0.0)
        tl.store(out_ptr + k + lane, rounded(x, inverse), mask=within)


def quantize_maps(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`fastsd.kernels.conv2d_fp8.quantize_maps` of contiguous `[B, H, W, C]`, C a multiple of 16."""
    size = x[0].numel()
    blocks = -(-size // (MOST * BLOCK))
    parts = -(-size // (blocks * BLOCK))
    values = torch.empty(x.shape, dtype=FP8, device=x.device)
    scales = torch.empty(len(x), dtype=torch.float32, device=x.device)
    largest = torch.empty(len(x), parts, dtype=torch.int32, device=x.device)
    with torch.cuda.device_of(x):
        _largest_of_parts_kernel[(parts, len(x))](
            *(x, largest, size // UNIT, blocks), BLOCK=BLOCK, num_warps=8, **OPTIONS
        )
        _quantize_maps_kernel[(parts, len(x))](
            *(x, largest, values, scales, size // UNIT, blocks), BLOCK=BLOCK, MOST=MOST, num_warps=8, **OPTIONS
        )
    return values, scales


def conv2d_fp8(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int = 1,
    padding: Padding = (0, 0, 0, 0),
    residual: torch.Tensor | None = None,
    launch: ConvBoxes | ConvPointers | None = None,
) -> torch.Tensor:
    """`fastsd.kernels.conv2d_fp8.conv2d_fp8`; `launch` overrides the launch table.

    Raises:
        ValueError: arguments that the kernel does not take, see `refusal`.
    """
    reason = refusal(x, weight, scale, bias, stride, padding, residual)
    if reason is not None:
        raise ValueError(f"conv2d_fp8: {reason}")
    values, scales = quantize_maps(x)
    taps = weight.permute(0, 2, 3, 1)[None]
    corner, size = (padding[2], padding[0]), size_of(x, weight, stride, padding)
    return Convolution(
        *(values, taps, bias, residual, "none", size, stride, corner, x.dtype), scales=(scales, scale)
    ).run(launch)


def refusal(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int = 1,
    padding: Padding = (0, 0, 0, 0),
    residual: torch.Tensor | None = None,
) -> str | None:
    """Why the kernels do not take these arguments of `conv2d_fp8`; None if they do."""
    reason = not_here(x)
    if reason is not None:
        return reason
    wanted = {"weight": (weight, FP8), "scale": (scale, torch.float32), "bias": (bias, x.dtype),
              "residual": (residual, x.dtype)}  # fmt: skip
    for name, (tensor, dtype) in wanted.items():
        if tensor is not None and tensor.dtype != dtype:
            return f"{name} is {tensor.dtype}; it needs {dtype}"
    if scale.shape != (len(weight),) or not scale.is_contiguous():
        return f"scale is {list(scale.shape)}; it needs [{len(weight)}], contiguous"
    reason = misplaced(x, weight, bias, stride, padding, residual)
    if reason is None and (x.shape[3] % UNIT or weight.storage_offset() % UNIT or x.numel() == 0):
        begin = weight.storage_offset()
        reason = f"x is {list(x.shape)}, the weight begins at element {begin}; channels in multiples of {UNIT}"
    return reason
