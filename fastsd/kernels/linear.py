"""Matrix products with an epilogue: bias, activation, residual."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from fastsd.cuda import blas
from fastsd.kernels import candidates, dispatch
from fastsd.kernels.candidates import GpuOp, OpCandidate
from fastsd.kernels.cpu import choices, onednn
from fastsd.kernels.launch import architecture, variants
from fastsd.kernels.launch.linear import Gemm

SHARE = 2**15  # elements that PyTorch computes in one thread at least (at::internal::GRAIN_SIZE)
LINE = 16  # elements of fp32 in a cache line
ROWS = 8  # rows of a product that are computed together
VECTORS = 64  # elements that PyTorch computes at a time at most: two AVX-512 vectors of 16-bit numbers


def activate(x: torch.Tensor, activation: str) -> torch.Tensor:
    """`x` through "none", "silu", "gelu" (exact) or "quick_gelu" (x * sigmoid(1.702 x), as in CLIP)."""
    if activation == "none":
        return x
    if activation == "silu":
        return F.silu(x)
    if activation == "gelu":
        return F.gelu(x)
    if activation == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    raise ValueError(f"linear: unknown activation {activation!r}; it must be none, silu, gelu or quick_gelu")


def activate_by_image(x: torch.Tensor, activation: str) -> torch.Tensor:
    """`activate`, image by image during inference on a CPU, so that an image's result does not depend on its batch."""
    if activation == "none" or len(x) < 2 or x.device.type != "cpu" or x.requires_grad or undivided(x):
        return activate(x, activation)
    return torch.cat([activate(image, activation) for image in x.split(1)])


def undivided(x: torch.Tensor) -> bool:
    """Whether an elementwise op on the CPU computes every image of `x` as it would alone.

    PyTorch gives each thread a share of the batch. The last elements of a share run scalar code, which rounds
    differently. A small batch is one share; if its images (or rows, where they lie apart) are whole vectors, no element
    of it is a last one. Where rows lie apart, GELU has other shares.
    """
    contiguous = x.is_contiguous()
    if torch.get_num_threads() > 1 and not (contiguous and x.numel() <= SHARE):
        return False
    if contiguous:
        return x.numel() // len(x) % VECTORS == 0
    return x.stride(-1) == 1 and x.shape[-1] % VECTORS == 0


def linear_ref(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    residual: torch.Tensor | None = None,
    skip: torch.Tensor | None = None,
) -> torch.Tensor:
    """The specification of `linear`: products and sums in fp32, rounded once."""
    if skip is not None:
        x = torch.cat([x, skip], dim=-1)
    y = dispatch.widen(x) @ dispatch.widen(weight).T
    if bias is not None:
        y = y + bias
    y = activate(y, activation)
    return (y if residual is None else y + residual).to(x.dtype)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    residual: torch.Tensor | None = None,
    skip: torch.Tensor | None = None,
) -> torch.Tensor:
    """`activation(cat([x, skip]) weight^T + bias) + residual`.

    Args:
        x: `[..., K1]`.
        weight: `[N, K]`, K = K1 or, with `skip`, K1 + K2; bias: `[N]`.
        activation: "none", "silu", "gelu" or "quick_gelu".
        residual: `[..., N]`.
        skip: `[..., K2]`, further columns of `x` (a skip connection).

    Returns:
        `[..., N]` in the dtype of `x`.
    """
    backend = dispatch.backend(x, weight, bias, residual, skip)
    if backend == "reference":
        return linear_ref(x, weight, bias, activation, residual, skip)
    if backend == "triton":
        return candidates.run(OP, x, weight, bias, activation, residual, skip)
    if backend == "onednn":
        x = x if skip is None else torch.cat([x, skip], dim=-1)
        return _linear_onednn(x, weight, bias, activation, residual)
    return _by_torch(x, weight, bias, activation, residual, skip)


def _by_two_products(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    residual: torch.Tensor | None,
    skip: torch.Tensor,
) -> torch.Tensor:
    """Two products read the parts in place, which costs less than concatenating them."""
    rows = F.linear(x, weight[:, : x.shape[-1]], bias).flatten(0, -2)
    rows.addmm_(skip.flatten(0, -2), weight[:, x.shape[-1] :].T)  # out of place, PyTorch would copy the rows first
    y = rows.view(*x.shape[:-1], -1)
    return y if residual is None else y + residual


def _by_cublaslt(x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
    """As `_by_torch`, by cuBLASLt. PyTorch asks it by itself only for a product with a bias."""
    with blas.preferred("cublaslt"):
        return _by_torch(x, weight, *rest)


def _no_cublaslt(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    residual: torch.Tensor | None,
    skip: torch.Tensor | None,
) -> str | None:
    return "PyTorch computes a product with a bias by cuBLASLt anyway" if bias is not None else None


def _by_triton(*args: Any, launch: Gemm | None = None) -> torch.Tensor:
    from fastsd.kernels.triton import linear as linear_triton

    return functools.partial(linear_triton.linear, launch=launch)(*args)


def _launches(
    thorough: bool,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    residual: torch.Tensor | None,
    skip: torch.Tensor | None,
) -> list[Gemm]:
    rows, (columns, depth) = x[..., 0].numel(), weight.shape
    launches = variants.products(thorough, architecture.class_of(x.device), rows, columns, depth, 0, x.element_size())
    return launches if skip is None else list(dict.fromkeys(replace(launch, splits=1) for launch in launches))


def _refused_by_triton(*args: Any) -> str | None:
    from fastsd.kernels.triton import linear as linear_triton

    return linear_triton.refuses(*args)


def _not_plain(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    residual: torch.Tensor | None,
    skip: torch.Tensor | None,
) -> str | None:
    return None if residual is skip is None and activation == "none" else "it computes a product and a bias alone"


def _no_two_products(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    residual: torch.Tensor | None,
    skip: torch.Tensor | None,
) -> str | None:
    return "it needs a skip connection and no activation" if skip is None or activation != "none" else None


def _by_torch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    residual: torch.Tensor | None,
    skip: torch.Tensor | None,
) -> torch.Tensor:
    if skip is not None:
        x = torch.cat([x, skip], dim=-1)
    y = activate_by_image(F.linear(x, weight, bias), activation)
    return y if residual is None else y + residual


OP = GpuOp(
    "linear",
    linear_ref,
    (
        # Where nothing is measured: cuBLAS, except where our kernel saves a launch.
        OpCandidate("cublas", _by_torch, _not_plain, partial=True),
        OpCandidate("triton", _by_triton, _refused_by_triton, partial=True, launches=_launches, launch_types=(Gemm,)),
        OpCandidate("cublaslt", _by_cublaslt, _no_cublaslt, measured=True, tuned=True),
        OpCandidate("two products", _by_two_products, _no_two_products, partial=True),
        OpCandidate("torch", _by_torch),
    ),
)


def _linear_onednn(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str, residual: torch.Tensor | None
) -> torch.Tensor:
    """`linear` on the CPU: oneDNN's products with a fused activation, or small ones by PyTorch.

    oneDNN can also add the residual, but reads it slower than a pass over the result does (measured).
    """
    fused = "none"
    if small_products(x, weight) == "torch":
        y = product_by_image(x, weight, bias)
    else:
        fused = activation if activation in onednn.ACTIVATIONS else "none"
        y = onednn.matmul(x.reshape(-1, x.shape[-1]), weight, bias, fused).view(*x.shape[:-1], -1)
    y = y if fused == activation else activate_by_image(y, activation)
    return y if residual is None else y.add_(residual)


def small_products(x: torch.Tensor, weight: torch.Tensor, op: str = "linear") -> str:
    """The way of a product of `x` `[B, ..., K]` by `weight` `[N, K]`.

    The results of PyTorch's product may depend on where in memory an image begins, hence the whole cache lines.
    """
    n, k = weight.shape
    rows = math.prod(x.shape[1:-1])
    aligned = x.ndim > 2 and rows > 1 and rows * k % LINE == 0 and rows * n % LINE == 0
    return choices.way(op, x.dtype, rows * n * k) if aligned else "onednn"


def product_by_image(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`x weight^T + bias` for `x` `[B, ..., K]` and `weight` `[N, K]` by PyTorch: a product for each image.

    The order of a product's sums depends on the number of its rows, so the images are no one product. They are one
    call where no thread is given part of an image, or parts of whole blocks (ROWS, LINE), which are computed alike.
    """
    n, k = weight.shape
    images = (x if x.ndim == 3 else x.reshape(len(x), -1, k)).contiguous()
    rows = images.shape[1]
    transposed = weight.t()
    if len(images) == 1 or torch.get_num_threads() == 1 or (rows % ROWS == 0 and n % LINE == 0):
        stacked = transposed.expand(len(images), k, n)
        y = torch.bmm(images, stacked) if bias is None else torch.baddbmm(bias, images, stacked)
    else:
        y = torch.cat([product_by_image(image, weight, bias) for image in images.split(1)])
    return y if x.ndim == 3 else y.view(*x.shape[:-1], n)
