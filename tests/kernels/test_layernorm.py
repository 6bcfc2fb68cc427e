"""Layer normalisation against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastsd.kernels import dispatch
from fastsd.kernels.layernorm import layernorm
from tests.support.precision import DTYPES, check, check_batch, rand


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "mean", "std"),
    [((2, 64, 320), 0.0, 1.0), ((3, 33), 0.0, 1.0), ((1, 1), 0.0, 1.0), ((5, 768), 30.0, 1e-3), ((2, 7, 64), 0.0, 1e4)],
)
@torch.no_grad()
def test_layernorm(shape, mean, std, dtype):
    x = rand(*shape, dtype=dtype, scale=std, mean=mean)
    w, b = rand(shape[-1], dtype=dtype), rand(shape[-1], dtype=dtype, seed=1)
    for name in ("onednn", "reference"):
        with dispatch.forced(name):
            check(
                lambda x, w, b: layernorm(x, w, b, 1e-5), lambda x, w, b: F.layer_norm(x, w.shape, w, b, 1e-5), x, w, b
            )


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float16))
@torch.no_grad()
def test_layernorm_does_not_depend_on_the_batch(dtype):
    w, b = rand(320, dtype=dtype), rand(320, dtype=dtype)
    check_batch(lambda x: layernorm(x, w, b, 1e-5), rand(5, 64, 320, dtype=dtype), anywhere=True)


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_layernorm_with_a_residual(dtype):
    x, residual = rand(2, 9, 48, dtype=dtype), rand(2, 9, 48, dtype=dtype, seed=1)
    w, b = rand(48, dtype=dtype), rand(48, dtype=dtype, seed=1)
    for name in ("onednn", "reference"):
        with dispatch.forced(name):
            normalised, total = layernorm(x, w, b, 1e-5, residual)
            assert torch.equal(total, x + residual)
            check(
                lambda x, w, b, r: layernorm(x, w, b, 1e-5, r)[0],
                lambda x, w, b, r: F.layer_norm(x + r, (48,), w, b, 1e-5),
                *(x, w, b, residual),
            )
