"""The candidates of an op: which one computes a call, and what happens when it fails. The failures are played."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fastsd.errors import FastsdError
from fastsd.kernels import candidates, dispatch
from fastsd.kernels.candidates import GpuOp, OpCandidate
from fastsd.kernels.choice.op import GPU_OPS, Way
from tests.support.told import told


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    candidates.forget()
    yield
    candidates.forget()


class CompilationError(Exception):
    """As Triton's, which is not there without Triton."""


class OutOfResources(Exception):
    """As Triton's."""


X = torch.ones(2, 3)


def op_of(*ways: OpCandidate | tuple[str, Any]) -> GpuOp:
    """An op whose candidates add their position to x, or raise."""

    def made(i: int, way: Any) -> OpCandidate:
        if isinstance(way, OpCandidate):
            return way
        name, fault = way

        def run(x: torch.Tensor) -> torch.Tensor:
            calls.append(name)
            if fault is not None:
                raise fault
            return x + i

        return OpCandidate(name, run)

    calls.clear()
    return GpuOp("played", lambda x: x, tuple(made(i, way) for i, way in enumerate(ways)))


calls: list[str] = []

FAULTS = {
    "compile": (CompilationError("at 3:4:\n  no tensor cores for this"), "CompilationError: no tensor cores for this"),
    "fit": (OutOfResources("out of resource: shared memory, Required: 300000"), "OutOfResources: out of resource: "),
    "type": (TypeError("None is no accumulator"), "TypeError: None is no accumulator"),
    "launch": (RuntimeError("CUDA error: invalid configuration argument"), "invalid configuration argument"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_candidate_that_fails_is_replaced_and_said_once(kind: str) -> None:
    fault, words = FAULTS[kind]
    op = op_of(("ours", fault), ("torch", None))
    with told(match=re.escape(words)) as caught:
        assert torch.equal(candidates.run(op, X), X + 1)
    assert len(caught) == 1
    assert "played: candidate 'ours' fails on this machine" in caught[0]
    assert "'torch' computes it instead" in caught[0]
    assert torch.equal(candidates.run(op, X), X + 1)  # a second warning would be an error here
    assert calls == ["ours", "torch", "torch"]  # and the first is not tried again


def test_other_sizes_are_tried_again_without_a_second_warning() -> None:
    op = op_of(("ours", CompilationError("no")), ("torch", None))
    with told():
        candidates.run(op, X)
    candidates.run(op, torch.ones(4))
    assert calls == ["ours", "torch", "ours", "torch"]


def test_each_candidate_that_fails_is_said() -> None:
    op = op_of(("one", CompilationError("no")), ("two", OutOfResources("large")), ("torch", None))
    with told() as caught:
        assert torch.equal(candidates.run(op, X), X + 2)
    assert [re.findall("'(.*?)'", one)[0] for one in caught] == ["one", "two"]


def test_a_call_that_no_candidate_takes_raises_the_first_error_without_a_warning() -> None:
    op = op_of(("ours", ValueError("rows of 7")), ("torch", RuntimeError("sizes do not match")))
    with pytest.raises(ValueError, match="rows of 7"):
        candidates.run(op, X)


@pytest.mark.parametrize(
    "fault",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: unspecified launch failure"),
        FastsdError("stop"),
        KeyboardInterrupt(),
    ],
    ids=repr,
)
def test_lost_memory_a_lost_gpu_and_errors_of_fastsd_are_raised(fault: BaseException) -> None:
    op = op_of(("ours", fault), ("torch", None))
    with pytest.raises(type(fault)):
        candidates.run(op, X)
    assert calls == ["ours"]


def refusing(reason: str, partial: bool) -> OpCandidate:
    def run(x: torch.Tensor) -> torch.Tensor:
        raise AssertionError

    return OpCandidate("ours", run, lambda x: reason, partial)


def test_a_refusal_is_said_once_and_that_of_a_partial_candidate_not() -> None:
    with told(match="played: it needs heads of 64; PyTorch computes it instead"):
        candidates.run(op_of(refusing("it needs heads of 64", False), ("torch", None)), X)
    assert torch.equal(candidates.run(op_of(refusing("not for 3 x 3", True), ("torch", None)), X), X + 1)


def test_a_forced_kernel_is_neither_replaced_nor_refused_in_silence() -> None:
    with dispatch.forced("triton"):
        with pytest.raises(CompilationError):
            candidates.run(op_of(("ours", CompilationError("no")), ("torch", None)), X)
        with pytest.raises(FastsdError, match="played: heads of 7"):
            candidates.run(op_of(refusing("heads of 7", False), ("torch", None)), X)
        assert torch.equal(candidates.run(op_of(refusing("not 3 x 3", True), ("torch", None)), X), X + 1)


def test_only_one_candidate_runs_where_it_is_asked_for() -> None:
    op = op_of(("one", None), ("two", None), ("torch", None))
    one, two, own = map(Way, op.candidates)
    with candidates.only("played", two):
        assert torch.equal(candidates.run(op, X), X + 1)
        with candidates.only("played", own):
            assert torch.equal(candidates.run(op, X), X + 2)
        assert torch.equal(candidates.run(op, X), X + 1)
    with candidates.only("played", one):
        assert torch.equal(candidates.run(op, X), X)
    failing = op_of(("ours", CompilationError("no")), ("torch", None))
    with candidates.only("played", Way(failing.candidates[0])), pytest.raises(CompilationError):
        candidates.run(failing, X)
    with candidates.only("played", Way(refusing("not 3 x 3", True))), pytest.raises(FastsdError, match="not 3 x 3"):
        candidates.run(op, X)


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (lambda x: x, True),
        (lambda x: x + 1, True),
        (lambda x: x[:1], False),
        (lambda x: x.half(), False),
        (lambda x: x.T.contiguous().T, False),
    ],
)
def test_the_key_of_a_call_is_its_sizes_strides_and_dtypes(change: Callable[[Any], Any], same: bool) -> None:
    op = GpuOp("played", lambda x: x, (), unkeyed=(4,))
    key = op.key_of((X, 1e-6, None, 2, X))
    assert (op.key_of((change(X), 1e-5, None, 2, torch.ones(9))) == key) is same
    assert op.key_of((X, 1e-5, None, 3, X)) != key


def test_every_op_with_candidates_ends_with_pytorchs_own() -> None:
    from fastsd.verify.watch import ops

    ours = {name: GPU_OPS[name] for name in ops() if name in GPU_OPS}
    assert set(ours) >= {"advance", "conv2d", "flash_attn", "geglu", "groupnorm_silu", "layernorm", "linear"}
    for op in ours.values():
        names = [candidate.name for candidate in op.candidates]
        assert names[-1] == "torch" and len(set(names)) == len(names)
        assert not op.candidates[-1].measured and not op.candidates[-1].partial
        assert op.reference.__name__ == f"{op.name}_ref"
        assert all(candidate.launch_types for candidate in op.candidates if candidate.launches is not None)
