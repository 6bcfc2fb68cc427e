"""`linear_fp8` on the GPU: one launch quantises the rows, a second one multiplies (`fastsd.kernels.triton.linear`)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastsd.kernels.launch import OPTIONS
from fastsd.kernels.launch.linear import UNIT_FP8 as UNIT
from fastsd.kernels.launch.linear import Gemm
from fastsd.kernels.launch.rowwise import row_stride
from fastsd.kernels.triton.linear import DTYPES, Product, multiply

FP8 = torch.float8_e4m3fn
OLDEST_GPU = (8, 9)  # with products of e4m3
BLOCK = 4096  # the most columns that a program holds at a time


@triton.jit(do_not_specialize=["K1", "K2"])
def _quantize_rows_kernel(
    x_ptr,  # [M, K1]
    skip_ptr,  # [M, K2] or None
    out_ptr,  # [M, K1 + K2] e4m3
    scale_ptr,  # [M] fp32
    K1,  # these in units of 16 elements
    K2,
    stride_x,
    stride_skip,
    BLOCK: tl.constexpr,
):
    """`fastsd.kernels.linear_fp8.quantize`, of a row by each program; parts of a row are concatenated."""
    row = tl.program_id(0).to(tl.int64)
    K1, K2 = K1 * 16, K2 * 16
    x_ptr += row * stride_x
    out_ptr += row * (K1 + K2)
    column = tl.arange(0, BLOCK)
    largest = tl.zeros([BLOCK], tl.float32)
    for k in range(0, K1, BLOCK):
        x = tl.load(x_ptr + k + column, mask=k + column < K1, other=0.0)
        largest = tl.maximum(largest, tl.abs(x.to(tl.float32)))
    if skip_ptr is not None:
        skip_ptr += row * stride_skip
        for k in range(0, K2, BLOCK):
            x = tl.load(skip_ptr + k + column, mask=k + column < K2, other=0.0)
            largest = tl.maximum(largest, tl.abs(x.to(tl.float32)))
    scale, inverse = scale_of(tl.max(largest, 0).to(tl.int32, bitcast=True))
    tl.store(scale_ptr + row, scale)
    for k in range(0, K1, BLOCK):  # again, from the cache
        x = tl.load(x_ptr + k + column, mask=k + column < K1, other=0.0)
        tl.store(out_ptr + k + column, rounded(x, inverse), mask=k + column < K1)
    if skip_ptr is not None:
        for k in range(0, K2, BLOCK):
            x = tl.load(skip_ptr + k + column, mask=k + column < K2, other=0.0)
            tl.store(out_ptr + K1 + k + column, rounded(x, inverse), mask=k + column < K2)


@triton.jit
def scale_of(bits):
    """`fastsd.kernels.linear_fp8.row_scales` of the bits of the largest absolute value, and 1 / scale."""
    exponent = ((bits + 0x1FFFFF) >> 23) - 8
    exponent = tl.minimum(tl.maximum(exponent, 1), 253)
    return (exponent << 23).to(tl.float32, bitcast=True), ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def rounded(x, inverse):
    """x times `inverse` as e4m3."""
    x = tl.clamp(x.to(tl.float32) * inverse, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    # To nearest even in fp32, by a number whose last bit is worth what e4m3's is at x: the interpreter's own conversion
    # rounds otherwise. The smallest normal exponent is -6, and 3 bits follow the first.
    exponent = tl.maximum((x.to(tl.int32, bitcast=True) >> 23) & 255, 121)
    large = (((exponent + 20) << 23) | 0x400000).to(tl.float32, bitcast=True)
    return ((x + large) - large).to(tl.float8e4nv)


def quantize(x: torch.Tensor, skip: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """`fastsd.kernels.linear_fp8.quantize` of `cat([x, skip])`: `[..., K1 + K2]` e4m3 and `[rows]` fp32."""
    more = 0 if skip is None else skip.shape[-1]
    rows, columns = x.numel() // x.shape[-1], x.shape[-1] + more
    values = torch.empty(*x.shape[:-1], columns, dtype=FP8, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    block = min(triton.next_power_of_2(max(x.shape[-1], more)), BLOCK)
    with torch.cuda.device_of(x):
        _quantize_rows_kernel[(rows,)](
            *(x, skip, values, scales, x.shape[-1] // UNIT, more // UNIT),
            *(row_stride("x", x), 0 if skip is None else row_stride("skip", skip)),
            BLOCK=block,
            num_warps=min(max(block // 512, 1), 8),
            **OPTIONS,
        )
    return values, scales


def linear_fp8(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    residual: torch.Tensor | None = None,
    skip: torch.Tensor | None = None,
    launch: Gemm | None = None,
) -> torch.Tensor:
    """`fastsd.kernels.linear_fp8.linear_fp8`; `launch` overrides the launch table.

    Raises:
        ValueError: arguments that the kernel does not take, see `refuses`.
    """
    reason = refuses(x, weight, scale, bias, activation, residual, skip)
    if reason is not None:
        raise ValueError(f"linear_fp8: {reason}")
    values, scales = quantize(x, skip)
    return multiply(Product(values, weight, x.dtype, bias, activation, residual, scales=(scales, scale)), launch)


def not_here(x: torch.Tensor) -> str | None:
    """Why there are no products of fp8 on the device of `x`, or none for its dtype."""
    if x.device.type == "cuda":
        capability = torch.cuda.get_device_capability(x.device)
        if torch.version.hip is not None or capability < OLDEST_GPU:
            return f"products of fp8 need sm_89 or newer, this is sm_{capability[0]}{capability[1]}"
    return None if x.dtype in DTYPES else f"x is {x.dtype}; the kernel takes 16 bits"


def refuses(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    residual: torch.Tensor | None = None,
    skip: torch.Tensor | None = None,
    gated: bool = False,
) -> str | None:
    """Why the kernels do not take these arguments of `linear_fp8` or, `gated`, of `geglu_fp8`; None if they do."""
    reason = not_here(x)
    if reason is not None:
        return reason
    depth = x.shape[-1] + (0 if skip is None else skip.shape[-1])
    rows, columns = x.numel() // max(x.shape[-1], 1), len(weight) // (2 if gated else 1)
    if not rows or not columns or (gated and len(weight) % 2):
        return f"{rows} rows, a weight of {len(weight)} rows; an empty product, or value and gate of unequal size"
    wanted = {
        "x": (x, (*x.shape[:-1], x.shape[-1]), x.dtype),
        "weight": (weight, (len(weight), depth), FP8),
        "scale": (scale, (len(weight),), torch.float32),
        "bias": (bias, (len(weight),), x.dtype),
        "residual": (residual, (*x.shape[:-1], columns), x.dtype),
        "skip": (skip, x.shape[:-1] + (depth - x.shape[-1],), x.dtype),
    }
    for name, (tensor, shape, dtype) in wanted.items():
        if tensor is None:
            continue
        if tensor.shape != shape or tensor.dtype != dtype:
            return f"{name} is {list(tensor.shape)} {tensor.dtype}; it needs {list(shape)} {dtype}"
        if name in ("weight", "scale", "bias") and not tensor.is_contiguous():
            return f"{name} is not contiguous"
        try:
            row_stride(name, tensor)
        except ValueError as error:
            return str(error)
    parts = (x.shape[-1], depth - x.shape[-1])
    if any(part % UNIT for part in parts) or weight.storage_offset() % UNIT:
        return f"K has parts of {parts}, the weight begins at element {weight.storage_offset()}; multiples of {UNIT}"
    return None
