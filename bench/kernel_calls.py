"""Calls of every kernel at Stable Diffusion's shapes, with tensors on the meta device, and what they launch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch

from bench.intercept import KernelLaunch, intercepted_launches
from fastsd.kernels.triton import add_bias_residual as add_bias_residual_triton
from fastsd.kernels.triton import advance as advance_triton
from fastsd.kernels.triton import conv2d as conv2d_triton
from fastsd.kernels.triton import conv2d_fp8 as conv2d_fp8_triton
from fastsd.kernels.triton import flash_attn as flash_attn_triton
from fastsd.kernels.triton import flash_attn_gradients as flash_attn_gradients_triton
from fastsd.kernels.triton import geglu as geglu_triton
from fastsd.kernels.triton import geglu_fp8 as geglu_fp8_triton
from fastsd.kernels.triton import groupnorm_silu as groupnorm_silu_triton
from fastsd.kernels.triton import layernorm as layernorm_triton
from fastsd.kernels.triton import linear as linear_triton
from fastsd.kernels.triton import linear_fp8 as linear_fp8_triton
from fastsd.kernels.triton import upsample2x_conv as upsample2x_conv_triton

FP8 = 89  # the first architecture with products of fp8

GROUPNORM = [  # pixels, channels, channels of the first input
    (64, 1280, 1280),
    (1024, 640, 640),
    (4096, 320, 320),
    (4096, 960, 640),
    (1024 * 1024, 128, 128),
]
CONVOLUTION = [  # side of the map, input and output channels, stride, phases of an upsampling
    (64, 320, 320, 1, 1),
    *((32, 640, 640, 1, 1), (16, 2560, 1280, 1, 1), (8, 1280, 1280, 1, 1)),  # split
    (64, 4, 320, 1, 1),
    (64, 320, 4, 1, 1),
    (64, 320, 320, 2, 1),
    (512, 256, 128, 1, 1),
    (128, 512, 512, 1, 4),
]
CONVOLUTION_FP8 = [  # side of the map, input and output channels, stride
    *((64, 320, 320, 1), (32, 640, 640, 1), (16, 2560, 1280, 1), (8, 1280, 1280, 1)),
    *((64, 320, 320, 2), (96, 640, 640, 1)),
]
SAME = (1, 1, 1, 1)  # padding
ATTENTION = [  # queries, keys, heads, head size
    *((4096, 4096, 8, size) for size in (32, 40, 64)),
    *((1024, 1024, 8, size) for size in (64, 80, 96, 128)),
    (256, 256, 8, 160),
    *((4096, 77, 8, 40), (4096, 77, 10, 64), (1024, 77, 8, 80), (256, 77, 8, 160)),
    (77, 77, 12, 64),
    (4096, 4096, 1, 512),
]
ATTENTION_GRADIENTS = [
    *((4096, 4096, 8, 40), (4096, 77, 10, 64), (1024, 1024, 8, 80), (256, 256, 8, 160)),
    (77, 77, 12, 64),
]
GATED = [(8192, 1280, 320), (2048, 5120, 1280)]  # rows, columns of the result, K
PRODUCTS = [  # rows, columns, K, columns of the skip input
    *((8192, 320, 320, 0), (8192, 640, 640, 0), (2048, 1280, 1280, 0), (128, 1280, 5120, 0)),
    (8192, 320, 640, 320),
]


Call = tuple[str, Callable[[], Any]]  # its name, and the call of a launcher


def launches(capability: int, dtype: torch.dtype) -> list[KernelLaunch]:
    """Every distinct launch of every op at the shapes above, on sm_`capability`."""
    calls = [*_norm_calls(dtype), *_epilogue_calls(dtype), *_geglu_calls(dtype), *_advance_calls(dtype)]
    if capability >= 80:  # sm_75 uses PyTorch's attention, products and convolutions
        calls += _attention_calls(dtype)
        calls += _product_calls(dtype) if dtype in linear_triton.DTYPES else ()
        calls += _convolution_calls(dtype) if dtype in conv2d_triton.DTYPES else ()
    if capability >= FP8 and dtype in linear_triton.DTYPES:
        calls += _fp8_calls(dtype)
    return _launches_of(calls, capability)


def training_launches(capability: int) -> list[KernelLaunch]:
    """The launches of attention in training, in bf16; they are in the models' table alone."""
    return _launches_of(_attention_gradient_calls(torch.bfloat16), capability) if capability >= 80 else []


def _launches_of(calls: Iterable[Call], capability: int) -> list[KernelLaunch]:
    """Every distinct launch of these calls."""
    by_name: dict[str, KernelLaunch] = {}
    for case, call in calls:

        def on_launch(kernel: Any, arguments: dict[str, Any], case: str = case) -> None:
            kernel_name = kernel.fn.__name__.strip("_").removesuffix("_kernel")
            name = case if kernel_name == case.split()[0] else f"{case}: {kernel_name}"
            by_name.setdefault(name, KernelLaunch(name, kernel, arguments))

        with intercepted_launches(capability, on_launch):
            call()
    return list(by_name.values())


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _norm_calls(dtype: torch.dtype) -> Iterator[Call]:
    run: Callable[..., Any] = groupnorm_silu_triton.groupnorm_silu
    for pixels, channels, first in GROUPNORM:
        x, vector = _meta(1, 1, pixels, first, dtype=dtype), _meta(channels, dtype=dtype)
        skip = _meta(1, 1, pixels, channels - first, dtype=dtype) if first < channels else None
        add = _meta(1, channels, dtype=dtype)
        case = f"groupnorm_silu {pixels}x{first}" + ("" if skip is None else f"+{channels - first}")
        yield case, partial(run, x, vector, vector, 32, 1e-5, True, add, skip)
    for columns in (320, 768, 1280):
        x, vector = _meta(1024, columns, dtype=dtype), _meta(columns, dtype=dtype)
        yield f"layernorm {columns}", partial(layernorm_triton.layernorm, x, vector, vector, 1e-5, (vector,) * 3)


def _epilogue_calls(dtype: torch.dtype) -> Iterator[Call]:
    for side, channels in ((32, 128), (32, 320), (32, 1280), (64, 320)):  # the last one with moments
        y, r = (_meta(1, side, side, channels, dtype=dtype) for _ in range(2))
        run = partial(add_bias_residual_triton.add_bias_residual, y, _meta(channels, dtype=dtype), r)
        yield f"add_bias_residual {side**2}x{channels}", run


def _geglu_calls(dtype: torch.dtype) -> Iterator[Call]:
    for columns in (1280, 5120):
        y, vector = _meta(1024, 2 * columns, dtype=dtype), _meta(2 * columns, dtype=dtype)
        yield f"geglu {columns}", partial(geglu_triton.geglu_gate, y, vector)


def _product_calls(dtype: torch.dtype) -> Iterator[Call]:
    for rows, columns, depth in GATED:
        x, weight = _meta(rows, depth, dtype=dtype), _meta(2 * columns, depth, dtype=dtype)
        bias, name = _meta(2 * columns, dtype=dtype), f"geglu {rows}x{columns}x{depth}"
        yield name, partial(linear_triton.geglu, x, weight, bias)
    for rows, columns, depth, skip in PRODUCTS:
        x, weight = _meta(rows, depth, dtype=dtype), _meta(columns, depth + skip, dtype=dtype)
        second = _meta(rows, skip, dtype=dtype) if skip else None
        bias, residual = _meta(columns, dtype=dtype), None if skip else _meta(rows, columns, dtype=dtype)
        name = f"linear {rows}x{columns}x{depth}" + (f"+{skip}" if skip else "")
        yield name, partial(linear_triton.linear, x, weight, bias, "none", residual, second)


def _fp8_calls(dtype: torch.dtype) -> Iterator[Call]:
    """Products and convolutions of an activation in `dtype`, which is quantised by launches of its own."""
    e4m3 = linear_fp8_triton.FP8
    for rows, columns, depth in GATED:
        x, weight = _meta(rows, depth, dtype=dtype), _meta(2 * columns, depth, dtype=e4m3)
        scale, bias = _meta(2 * columns), _meta(2 * columns, dtype=dtype)
        yield f"geglu_fp8 {rows}x{columns}x{depth}", partial(geglu_fp8_triton.geglu_fp8, x, weight, scale, bias)
    for rows, columns, depth, skip in PRODUCTS:
        x, weight = _meta(rows, depth, dtype=dtype), _meta(columns, depth + skip, dtype=e4m3)
        second = _meta(rows, skip, dtype=dtype) if skip else None
        residual = None if skip else _meta(rows, columns, dtype=dtype)
        arguments = weight, _meta(columns), _meta(columns, dtype=dtype), "none", residual, second
        name = f"linear_fp8 {rows}x{columns}x{depth}" + (f"+{skip}" if skip else "")
        yield name, partial(linear_fp8_triton.linear_fp8, x, *arguments)
    for side, inputs, outputs, stride in CONVOLUTION_FP8:
        x, weight = _meta(2, side, side, inputs, dtype=dtype), _meta(outputs, 3, 3, inputs, dtype=e4m3)
        residual = _meta(2, side, side, outputs, dtype=dtype) if stride == 1 else None
        arguments = weight.permute(0, 3, 1, 2), _meta(outputs), _meta(outputs, dtype=dtype), stride, SAME, residual
        name = f"conv2d_fp8 {side}x{side}x{inputs} " + ("halved" if stride == 2 else f"to {outputs}")
        yield name, partial(conv2d_fp8_triton.conv2d_fp8, x, *arguments)


def _advance_calls(dtype: torch.dtype) -> Iterator[Call]:
    x, history, noise = (_meta(*shape) for shape in ((1, 64, 64, 4), (3, 1, 64, 64, 4), (2, 1, 64, 64, 4)))
    x_in = _meta(1, 64, 64, 4, dtype=dtype)
    row, table, guidance = _meta(1, dtype=torch.int64), _meta(31, 16), _meta(1)
    run = advance_triton.advance
    out = _meta(2, 64, 64, 4, dtype=dtype)
    yield "advance", partial(run, x, x_in, out, table, row, x, history, noise, guidance)
    out = _meta(3, 64, 64, 4, dtype=dtype)
    yield "advance, text and image", partial(run, x, x_in, out, table, row, x, history, noise, guidance, None, guidance)


def _attention_calls(dtype: torch.dtype) -> Iterator[Call]:
    for queries, keys, heads, size in ATTENTION:
        q, k, v, causal, case = _attention(queries, keys, heads, size, dtype)
        yield f"flash_attn {case}", partial(flash_attn_triton.flash_attn, q, k, v, causal)


def _attention_gradient_calls(dtype: torch.dtype) -> Iterator[Call]:
    def both_passes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> None:
        out, lse = flash_attn_gradients_triton.forward(q, k, v, causal)
        flash_attn_gradients_triton.backward(out, q, k, v, out, lse, causal)

    for queries, keys, heads, size in ATTENTION_GRADIENTS:
        q, k, v, causal, case = _attention(queries, keys, heads, size, dtype)
        yield f"flash_attn_gradients {case}", partial(both_passes, q, k, v, causal)


def _attention(
    queries: int, keys: int, heads: int, size: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, bool, str]:
    """q, k and v as views of fused projections; whether a mask is causal, as a text encoder's is; and a name."""
    causal = queries == 77
    q = _meta(1, queries, 3, heads, size, dtype=dtype)[:, :, 0]
    k, v = _meta(1, keys, 2, heads, size, dtype=dtype).unbind(2)
    return q, k, v, causal, f"{queries}x{keys}x{size}" + (" causal" if causal else "")


def _convolution_calls(dtype: torch.dtype) -> Iterator[Call]:
    for side, inputs, outputs, stride, phases in CONVOLUTION:
        x = _meta(2 if side < 128 else 1, side, side, inputs, dtype=dtype)
        weight = _meta(outputs, 3, 3, inputs, dtype=dtype).permute(0, 3, 1, 2)
        bias, case = _meta(outputs, dtype=dtype), f"conv2d {side}x{side}x{inputs} to {outputs}"
        if phases == 4:
            yield f"{case} doubled", partial(upsample2x_conv_triton.upsample2x_conv, x, weight, bias)
            continue
        residual = _meta(*x.shape[:3], outputs, dtype=dtype) if stride == 1 else None
        case += "" if stride == 1 else f" stride {stride}"
        yield case, partial(conv2d_triton.conv2d, x, weight, bias, stride, SAME, residual)
