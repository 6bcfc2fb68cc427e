"""The gradients of every op that a model calls, against those of its specification in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastsd.kernels import dispatch
from fastsd.kernels.add_product import add_product
from fastsd.kernels.conv2d import conv2d
from fastsd.kernels.flash_attn import flash_attn
from fastsd.kernels.geglu import geglu
from fastsd.kernels.groupnorm_silu import groupnorm_silu
from fastsd.kernels.layernorm import layernorm
from fastsd.kernels.linear import linear
from fastsd.kernels.upsample2x import upsample2x, upsample2x_conv
from tests.support.precision import check

Shapes = tuple[tuple[int, ...], ...]
Op = Callable[..., torch.Tensor]


def added(total: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    total = total * 1  # in place on a leaf, PyTorch refuses
    add_product(total, x, weight)
    return total


# Each op with the shapes of its tensors, and the terms of the longest sum in its gradients.
OPS: dict[str, tuple[Op, Shapes, int]] = {
    "linear": (lambda x, w, b, r: linear(x, w, b, "none", r), ((2, 6, 24), (16, 24), (16,), (2, 6, 16)), 24),
    "linear silu": (lambda x, w, b: linear(x, w, b, "silu"), ((2, 6, 24), (16, 24), (16,)), 48),
    "linear quick_gelu": (lambda x, w, b: linear(x, w, b, "quick_gelu"), ((2, 6, 24), (16, 24), (16,)), 48),
    "linear gelu": (lambda x, w, b: linear(x, w, b, "gelu"), ((2, 6, 24), (16, 24), (16,)), 48),
    "linear skip": (lambda x, w, s: linear(x, w, skip=s), ((2, 6, 16), (16, 24), (2, 6, 8)), 24),
    "add_product": (added, ((2, 6, 16), (2, 6, 24), (16, 24)), 24),
    "conv2d": (
        lambda x, w, b, r: conv2d(x, w, b, 1, (1, 1, 1, 1), r),
        ((2, 6, 5, 8), (8, 8, 3, 3), (8,), (2, 6, 5, 8)),
        72,
    ),
    "conv2d strided": (lambda x, w, b: conv2d(x, w, b, 2, (0, 1, 0, 1)), ((2, 6, 6, 8), (8, 8, 3, 3), (8,)), 72),
    "geglu": (geglu, ((2, 6, 16), (48, 16), (48,)), 96),
    "layernorm": (lambda x, w, b: layernorm(x, w, b, 1e-5), ((2, 6, 32), (32,), (32,)), 128),
    "groupnorm_silu": (
        lambda x, w, b, a, s: groupnorm_silu(x, w, b, 4, 1e-5, True, a, s),
        ((2, 5, 4, 16), (24,), (24,), (2, 24), (2, 5, 4, 8)),
        480,
    ),
    "flash_attn": (flash_attn, ((2, 9, 2, 16), (2, 7, 2, 16), (2, 7, 2, 16)), 128),
    "flash_attn causal": (lambda q, k, v: flash_attn(q, k, v, causal=True), ((2, 9, 2, 16),) * 3, 128),
    "upsample2x": (upsample2x, ((2, 3, 4, 8),), 4),
    "upsample2x_conv": (upsample2x_conv, ((2, 3, 4, 8), (8, 8, 3, 3), (8,)), 288),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", OPS)
def test_gradients(name: str, dtype: torch.dtype) -> None:
    op, shapes, terms = OPS[name]
    generator = torch.Generator().manual_seed(2)
    inputs = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    out = op(*inputs)
    seeds = torch.randn(out.shape, generator=generator).to(dtype)

    def gradients(*given: torch.Tensor) -> torch.Tensor:
        """All gradients, one after the other."""
        given = tuple(x.detach().requires_grad_() for x in given)
        found = torch.autograd.grad(op(*given), given, seeds.to(given[0].dtype))
        return torch.cat([gradient.flatten() for gradient in found])

    def plain(*given: torch.Tensor) -> torch.Tensor:
        with dispatch.reference_only():
            return gradients(*given)

    check(gradients, plain, *inputs, roundings=terms)
