"""A product added in place, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastsd.kernels import candidates, dispatch
from fastsd.kernels.add_product import OP, add_product
from fastsd.kernels.choice.op import Way
from tests.support.precision import DTYPES, check, rand


def by(name, total, x, w):
    out = total.clone()
    candidate = OP.candidate(name)
    if candidate is not None:
        with candidates.only("add_product", Way(candidate)), dispatch.forced("triton"):
            add_product(out, x, w)
    else:
        with dispatch.forced(name):
            add_product(out, x, w)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "k", "n"), [((2, 20), 320, 64), ((1, 77), 33, 17), ((1,), 64, 64), ((3, 5), 1, 1)])
@pytest.mark.parametrize("name", ["onednn", "reference", "cublas", "torch"])
@torch.no_grad()
def test_add_product(name, rows, k, n, dtype):
    total, x = rand(*rows, n, dtype=dtype, seed=1), rand(*rows, k, dtype=dtype)
    w = rand(n, k, dtype=dtype, scale=k**-0.5)
    check(lambda *t: by(name, *t), lambda t, x, w: t + F.linear(x, w), total, x, w, roundings=k + 1)


@torch.no_grad()
def test_a_total_with_gaps_is_the_next_candidates_work():
    """The first one needs rows without gaps, which is what the models have."""
    total, x, w = rand(4, 12, dtype=torch.float32)[:, :8], rand(4, 6, dtype=torch.float32), torch.ones(8, 6)
    assert "strides" in str(OP.candidates[0].refuses(total, x, w))
    before = total.clone()
    add_product(total, x, w)
    torch.testing.assert_close(total, before + x.sum(-1, keepdim=True))
