"""Every op is seen as the models call it, and nothing is left behind."""

from __future__ import annotations

import pytest
import torch

from fastsd.kernels import upsample2x
from fastsd.kernels.linear import linear
from fastsd.model import layers
from fastsd.pipeline import Pipeline
from fastsd.verify.drive import drive
from fastsd.verify.watch import Call, ops, watched

OPS = {"advance", "conv2d", "flash_attn", "geglu", "groupnorm_silu", "layernorm", "linear", "upsample2x"}


def test_every_op_is_found() -> None:
    assert set(ops()) == OPS | {"upsample2x_conv"}
    assert ops()["linear"].run is linear


def test_a_run_calls_every_op(pipe: Pipeline) -> None:
    seen: list[Call] = []
    with watched(seen.append):
        drive(pipe, "an eight", 64, 64)
    assert {call.op.name for call in seen} == OPS - {"upsample2x"} | {"upsample2x_conv"}
    assert layers.linear is linear  # as before
    before = len(seen)
    drive(pipe, "an eight", 64, 64)
    assert len(seen) == before


def test_what_an_op_calls_is_not_told() -> None:
    seen: list[Call] = []
    with watched(seen.append):
        upsample2x.upsample2x_conv(torch.zeros(1, 2, 2, 4), torch.zeros(3, 4, 3, 3), torch.zeros(3))
    assert [call.op.name for call in seen] == ["upsample2x_conv"]


def test_names_come_back_after_an_error() -> None:
    with pytest.raises(RuntimeError, match="stop"), watched(lambda call: None):
        assert layers.linear is not linear
        raise RuntimeError("stop")
    assert layers.linear is linear


def test_keys_tell_shapes_strides_and_dtypes_apart() -> None:
    op, x, w = ops()["linear"], torch.zeros(4, 8), torch.zeros(2, 8)
    key = Call.of(op, x, w).key
    assert key == Call.of(op, torch.ones(4, 8), weight=w).key
    others = [x.half(), x[:2], torch.zeros(8, 4).T]
    assert all(Call.of(op, other, w).key != key for other in others)
    assert Call.of(op, x, w, activation="silu").key != key


def test_ops_in_place_leave_the_callers_tensors_alone() -> None:
    shape = (1, 2, 2, 4)
    x, table = torch.ones(shape), torch.ones(2, 16)
    call = Call.of(
        ops()["advance"], x, torch.ones(shape), torch.ones(shape), table, torch.zeros(1, dtype=torch.int64),
        torch.ones(shape), torch.ones(3, *shape), torch.ones(2, *shape), 1.0,
    )  # fmt: skip
    results = call.run()
    assert len(results) == 5 and not torch.equal(results[0], x)
    assert bool((x == 1).all())
