"""`geglu_fp8` on the GPU: the kernels of `linear_fp8`, with the gate."""

from __future__ import annotations

import torch

from fastsd.kernels.launch.linear import Gemm
from fastsd.kernels.triton.linear import Product, multiply
from fastsd.kernels.triton.linear_fp8 import quantize, refuses


def geglu_fp8(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, launch: Gemm | None = None
) -> torch.Tensor:
    """`fastsd.kernels.geglu_fp8.geglu_fp8`; `launch` overrides the launch table.

    Raises:
        ValueError: arguments that the kernel does not take, see `refuses`.
    """
    reason = refuses(x, weight, scale, bias, gated=True)
    if reason is not None:
        raise ValueError(f"geglu_fp8: {reason}")
    values, scales = quantize(x)
    return multiply(Product(values, weight, x.dtype, bias, gated=True, scales=(scales, scale)), launch)
