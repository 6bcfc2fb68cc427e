"""Every op call of the models is observed, and the modules are restored afterwards."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastsd.kernels import upsample2x
from fastsd.kernels.choice.call import Call
from fastsd.kernels.linear import linear
from fastsd.model import linear as layer
from fastsd.verify.watch import observed, ops

OPS = {"add_product", "advance", "conv2d", "flash_attn", "geglu", "groupnorm_silu", "layernorm", "linear", "upsample2x"}


def test_every_op_is_found() -> None:
    assert set(ops()) == OPS | {"upsample2x_conv", "conv2d_fp8", "geglu_fp8", "linear_fp8"}
    assert ops()["linear"].run is linear


def test_a_run_calls_every_op(short_run: Callable[[], None]) -> None:
    calls: list[Call] = []
    with observed(calls.append):
        short_run()
    # Models add products in place only where a GPU computes them.
    assert {call.op.name for call in calls} == OPS - {"upsample2x", "add_product"} | {"upsample2x_conv"}
    assert layer.linear is linear  # restored
    count = len(calls)
    short_run()
    assert len(calls) == count


def test_calls_between_ops_are_not_observed() -> None:
    calls: list[Call] = []
    with observed(calls.append):
        upsample2x.upsample2x_conv(torch.zeros(1, 2, 2, 4), torch.zeros(3, 4, 3, 3), torch.zeros(3))
    assert [call.op.name for call in calls] == ["upsample2x_conv"]


def test_ops_are_restored_after_an_error() -> None:
    with pytest.raises(RuntimeError, match="stop"), observed(lambda call: None):
        assert layer.linear is not linear
        raise RuntimeError("stop")
    assert layer.linear is linear


def test_keys_distinguish_shapes_strides_and_dtypes() -> None:
    op, x, w = ops()["linear"], torch.zeros(4, 8), torch.zeros(2, 8)
    key = Call.bind(op, x, w).key
    assert key == Call.bind(op, torch.ones(4, 8), weight=w).key
    others = [x.half(), x[:2], torch.zeros(8, 4).T]
    assert all(Call.bind(op, other, w).key != key for other in others)
    assert Call.bind(op, x, w, activation="silu").key != key


def test_ops_in_place_do_not_modify_the_callers_tensors() -> None:
    shape = (1, 2, 2, 4)
    x, table = torch.ones(shape), torch.ones(2, 16)
    call = Call.bind(
        ops()["advance"], x, torch.ones(shape), torch.ones(shape), table, torch.zeros(1, dtype=torch.int64),
        torch.ones(shape), torch.ones(3, *shape), torch.ones(2, *shape), 1.0,
    )  # fmt: skip
    outputs = call.run()
    assert len(outputs) == 5 and not torch.equal(outputs[0], x)
    assert bool((x == 1).all())
