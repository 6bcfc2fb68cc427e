"""Ops pass; a broken op fails alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastsd.kernels import flash_attn, groupnorm_silu
from fastsd.verify.ops import check_op, check_ops
from fastsd.verify.watch import Call, ops
from tests.support.verification import failures


def test_ops_pass(short_run: Callable[[], None]) -> None:
    results = check_ops(short_run, None)
    assert all(result.passed for result in results)
    assert sum(result.calls for result in results) > len(results)  # calls of equal shapes share a result
    assert all(result.torch_error for result in results if result.name == "conv2d")


def test_a_broken_op_fails_alone(short_run: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    correct = groupnorm_silu._groupnorm_silu_by_image
    monkeypatch.setattr(groupnorm_silu, "_groupnorm_silu_by_image", lambda *args: correct(*args) * 1.00002)
    assert failures(check_ops(short_run, None)) == {"groupnorm_silu"}


def test_attention_head_by_head_is_the_specification() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 3, 16, generator=generator) for n in (5, 7, 7))
    result = check_op(Call.bind(ops()["flash_attn"], q, k, v), None)
    exact = flash_attn.flash_attn_ref(q.double(), k.double(), v.double())
    error = (flash_attn.flash_attn(q, k, v).double() - exact).abs().max().item()
    assert result.passed and result.torch_error == pytest.approx(error, rel=1e-6)
