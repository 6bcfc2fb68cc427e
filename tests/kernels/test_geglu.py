"""GEGLU with its product against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastsd.kernels import dispatch
from fastsd.kernels.geglu import geglu
from tests.support.precision import DTYPES, check, check_batch, rand


def plain(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    value, gate = F.linear(x, w, b).chunk(2, -1)
    return value * F.gelu(gate)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "k", "n"), [((2, 64), 32, 128), ((3,), 33, 17), ((1,), 64, 256), ((1, 4100), 8, 600)])
@torch.no_grad()
def test_geglu(rows, k, n, dtype):
    """The last shape needs more than one chunk."""
    x, w, b = rand(*rows, k, dtype=dtype), rand(2 * n, k, dtype=dtype, scale=k**-0.5), rand(2 * n, dtype=dtype)
    check(geglu, plain, x, w, b, roundings=2 * (k + 1))  # both factors are sums
    with dispatch.reference_only():
        check(geglu, plain, x, w, b, roundings=2 * (k + 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("s", "k"), [(64, 64), (49, 32), (1, 48)])
@torch.no_grad()
def test_geglu_does_not_depend_on_the_batch(s, k, dtype):
    w, b = rand(8 * k, k, dtype=dtype, scale=k**-0.5), rand(8 * k, dtype=dtype)
    check_batch(lambda x: geglu(x, w, b), rand(5, s, k, dtype=dtype))


def test_geglu_gradients():
    tensors = [rand(*shape, dtype=torch.float64).requires_grad_(True) for shape in ((2, 3), (8, 3), (8,))]
    assert torch.autograd.gradcheck(geglu, tensors)
