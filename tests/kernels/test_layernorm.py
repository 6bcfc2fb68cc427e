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
@pytest.mark.parametrize("count", [1, 3])
@torch.no_grad()
def test_layernorm_with_biases_ahead_and_owed(count, dtype):
    """Their sum is taken in fp32; PyTorch's rounds it in between, which the rule allows for."""
    x, w, b = rand(2, 9, 48, dtype=dtype), rand(48, dtype=dtype), rand(48, dtype=dtype, seed=1)
    vectors = [rand(48, dtype=dtype, seed=2 + i) for i in range(count)]
    for name in ("onednn", "reference"):
        with dispatch.forced(name):
            for output in (0, 1):
                check(
                    lambda x, w, b, *v, output=output: layernorm(x, w, b, 1e-5, ahead=v)[output],
                    lambda x, w, b, *v, output=output: (F.layer_norm(x, (48,), w, b, 1e-5), x + sum(v))[output],
                    *(x, w, b, *vectors),
                )
            check(
                lambda x, w, b, *v: layernorm(x, w, b, 1e-5, owed=v),
                lambda x, w, b, *v: F.layer_norm(x - sum(v), (48,), w, b, 1e-5),
                *(x, w, b, *vectors),
            )


@torch.no_grad()
def test_what_is_ahead_and_then_owed_is_not_seen():
    x, w, b = rand(4, 48, dtype=torch.float32), rand(48, dtype=torch.float32), rand(48, dtype=torch.float32, seed=1)
    before, total = layernorm(x, w, b, 1e-5, ahead=(w, b))
    assert total is not x and torch.equal(before, layernorm(x, w, b, 1e-5))
    # Two roundings of the sum, relative to a deviation of about 1.
    torch.testing.assert_close(layernorm(total, w, b, 1e-5, owed=(w, b)), before, rtol=0, atol=4e-6)
