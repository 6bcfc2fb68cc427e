"""Ops pass; a broken op fails alone."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch

from fastsd.kernels import dispatch, flash_attn, groupnorm_silu, layernorm
from fastsd.kernels.candidates import GpuOp, OpCandidate
from fastsd.kernels.choice.call import Call
from fastsd.kernels.choice.op import GPU_OPS
from fastsd.kernels.choice.truth import order_slack
from fastsd.verify.ops import check_candidates, check_op, check_ops
from fastsd.verify.watch import ops
from tests.support.verification import failures


def test_ops_pass(short_run: Callable[[], None]) -> None:
    results = check_ops(short_run, None)
    assert all(result.passed for result in results)
    assert sum(result.calls for result in results) > len(results)  # calls of equal shapes share a result
    assert all(result.torch_error for result in results if result.name == "conv2d")


def test_a_broken_op_fails_alone(short_run: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    correct = groupnorm_silu._groupnorm_silu_cpu
    monkeypatch.setattr(groupnorm_silu, "_groupnorm_silu_cpu", lambda *args: correct(*args) * 1.00002)
    assert failures(check_ops(short_run, None)) == {"groupnorm_silu"}


def test_attention_head_by_head_is_the_specification() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 3, 16, generator=generator) for n in (5, 7, 7))
    result = check_op(Call.bind(ops()["flash_attn"], q, k, v), None)
    exact = flash_attn.flash_attn_ref(q.double(), k.double(), v.double())
    error = (flash_attn.flash_attn(q, k, v).double() - exact).abs().max().item()
    assert result.passed and result.torch_error == pytest.approx(error, rel=1e-6)


@pytest.mark.parametrize("scale", [0.01, 0.3, 2.0])
@pytest.mark.parametrize(("s", "t", "heads", "size"), [(1024, 1024, 4, 64), (512, 2048, 1, 40), (256, 256, 1, 512)])
def test_attention_may_add_up_in_any_order_but_in_fp32(
    s: int, t: int, heads: int, size: int, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of these, twice PyTorch's error and an ulp would refuse four or five, which ones by the processor."""
    generator = torch.Generator().manual_seed(0)
    parts = ((s, scale), (t, scale), (t, 1.0))
    q, k, v = (torch.randn(1, n, heads, size, generator=generator) * x for n, x in parts)
    call = Call.bind(ops()["flash_attn"], q, k, v)
    assert check_op(call, None).passed

    def to_tf32(x: torch.Tensor) -> torch.Tensor:
        return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    correct = flash_attn._image_fp32
    monkeypatch.setattr(flash_attn, "_image_fp32", lambda q, k, v: correct(q, k, to_tf32(v)))
    assert not check_op(call, None).passed


def test_attention_of_some_keys_and_of_the_past_has_its_own_allowance() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 40, 2, 16, generator=generator) for _ in range(3))
    op = ops()["flash_attn"]
    some, first = order_slack(Call.bind(op, q, k, v, key_length=9)), order_slack(Call.bind(op, q, k[:, :9], v[:, :9]))
    assert some == first != order_slack(Call.bind(op, q, k, v))
    # Of one key the result is its value, so the order of sums is all that is left: sqrt(T) (|v| + |v|), twice.
    single = order_slack(Call.bind(op, q[:, :1], k[:, :1], v[:, :1], causal=True))
    assert single == pytest.approx(4 * 2.0**-24 * v[:, :1].abs().max().item())
    assert order_slack(Call.bind(op, *(x.bfloat16() for x in (q, k, v)))) == 0


class CompilationError(Exception):
    """As Triton's."""


def test_each_candidate_is_checked_whichever_was_chosen() -> None:
    x, w = torch.randn(3, 40), torch.ones(40)
    ours, own = layernorm.OP.candidates
    refusing = OpCandidate("refusing", ours.run, lambda *args: "it needs rows of 64")
    wrong = OpCandidate("wrong", lambda *args: own.run(*args) * 1.01)
    failing = OpCandidate("failing", raising(CompilationError("no mma")))
    library = OpCandidate("library", raising(RuntimeError("no engine")), measured=True)
    op = GpuOp("layernorm", layernorm.layernorm_ref, (refusing, wrong, failing, library, own))
    try:
        with mock.patch.object(layernorm, "OP", op), dispatch.forced("triton"):
            results = check_candidates(Call.bind(ops()["layernorm"], x, w, w, 1e-5), None)
    finally:
        GPU_OPS["layernorm"] = layernorm.OP
    assert [(result.name, result.passed) for result in results] == [
        ("layernorm [wrong]", False),
        ("layernorm [failing]", False),
        ("layernorm [library]", None),
        ("layernorm [torch]", True),
    ]
    assert results[1].note == "CompilationError: no mma"


def raising(error: Exception) -> Callable[..., None]:
    def run(*_: object) -> None:
        raise error

    return run
