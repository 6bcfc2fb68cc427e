"""The rule of precision.py passes any order of a sum, and fails products in less than fp32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.support.precision import check, rand

TERMS = [64, 768, 9 * 640]


def in_one_chain(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """The order with the largest rounding errors: one product after another, in one sum."""
    total = x.new_zeros(len(x), len(w))
    for k in range(x.shape[1]):
        total = total + x[:, k : k + 1] * w[:, k]
    return total


def to_tf32(x: torch.Tensor) -> torch.Tensor:
    """`x` rounded to 11 significant bits, as NVIDIA's tensor cores read fp32."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def operands(terms: int) -> tuple[torch.Tensor, torch.Tensor]:
    return rand(77, terms, dtype=torch.float32), rand(64, terms, dtype=torch.float32, scale=terms**-0.5)


@pytest.mark.parametrize("terms", TERMS)
def test_any_order_of_a_sum_passes(terms):
    check(in_one_chain, F.linear, *operands(terms), roundings=terms)


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("narrower", [to_tf32, lambda x: x.bfloat16().float()], ids=["tf32", "bf16"])
def test_a_narrower_product_fails(terms, narrower):
    with pytest.raises(AssertionError, match="from the truth"):
        check(lambda x, w: F.linear(narrower(x), narrower(w)), F.linear, *operands(terms), roundings=terms)


@pytest.mark.parametrize("terms", TERMS)
def test_a_missing_term_fails(terms):
    with pytest.raises(AssertionError, match="from the truth"):
        check(lambda x, w: F.linear(x[:, 1:], w[:, 1:]), F.linear, *operands(terms), roundings=terms)
