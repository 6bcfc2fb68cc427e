"""Ways are run in child processes, which really die: of an abort, an exit, a hang, a fault of the GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsd.kernels import candidates
from fastsd.kernels.candidates import ChoiceMode, choosing
from fastsd.kernels.choice import decide, probe
from fastsd.kernels.choice.op import OpCandidate, Way, decoded, encoded, key_text
from fastsd.kernels.choice.probe import ProbeFault, Prober
from tests.support import dying
from tests.support.played_gpu import PlayedGpu, doubling, played, restart, way
from tests.support.told import told

CPU, X = torch.device("cpu"), torch.ones(4)


@pytest.fixture
def prober() -> Iterator[Prober]:
    made = Prober(CPU)
    yield made
    made.close()


@pytest.mark.heavy
def test_each_way_that_ends_its_child_is_found_and_named(prober: Prober, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "ANSWER", 5.0)
    ways = [Way(one) for one in dying.OP.candidates if one.name not in ("leaves", "torch")]
    assert prober.faults(dying.OP, (X,), ways) == {
        "aborts": ProbeFault("it ended the process (SIGABRT): this is why"),
        "is_killed": ProbeFault("it ended the process (SIGKILL)", lasting=False),  # as by the kernel, out of memory
        "hangs": ProbeFault("no answer in 5 s: it begins", lasting=False),
        "faults": ProbeFault("RuntimeError: CUDA error: an illegal memory access was encountered"),
    }
    child = prober._child
    assert prober.faults(dying.OP, (X,), ways[:2]) == {}
    assert child is None or prober._child is child  # one that lives is used again
    prober.close()
    assert prober._child is None and prober.broken is None


@pytest.mark.heavy
def test_a_child_without_work_ends_and_another_one_starts(prober: Prober, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds memory of the GPU."""
    monkeypatch.setattr(probe, "IDLE", 0.1)
    doubles = [Way(dying.OP.candidates[1])]
    assert prober.faults(dying.OP, (X,), doubles) == {}
    assert prober._timer is not None
    prober._timer.join(20)
    assert prober._child is None
    assert prober.faults(dying.OP, (X,), doubles) == {} and prober.broken is None


@pytest.mark.heavy
def test_on_a_gpu_never_seen_before_the_child_dies_and_not_we(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`dying.OP` would end this process if anything but its child ran the first way."""
    with played(tmp_path, PlayedGpu(), monkeypatch) as gpu:
        gpu.takes = 1.0
        deadly = candidates.GpuOp(
            "dying", dying.double_ref, (OpCandidate("leaves", dying.leaves), dying.OP.own.candidate)
        )
        with told() as lines:
            assert torch.equal(candidates.run(deadly, X), 2 * X)
        new, dead = lines
        assert "NVIDIA H200 (played) is new here" in new and "--no-probe" in new
        assert "'leaves' is excluded: it fails in a process of its own: it ended the process (exit code 3)" in dead
        restart()
        assert torch.equal(candidates.run(deadly, X), 2 * X)  # the next process knows
        gpu.takes = 1.0
        with pytest.raises(SystemExit):  # a GPU that was seen before: other sizes are not tried in a child
            candidates.run(deadly, torch.ones(5))


def test_without_a_probe_no_child_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(probe.subprocess, "Popen", refuse)
    with played(tmp_path, PlayedGpu(), monkeypatch) as gpu:
        op = doubling(way(gpu, "ours", 1e-6), way(gpu, "torch", 1e-5))
        with choosing(ChoiceMode(probe=False)):
            candidates.run(op, X)
        restart()
        assert not decide.gpu_of(CPU).unseen
        candidates.run(op, torch.ones(5))


def test_where_no_child_can_start_it_is_said_once_and_the_image_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("processes are not allowed")

    monkeypatch.setattr(probe.subprocess, "Popen", fail)
    with played(tmp_path, PlayedGpu(), monkeypatch) as gpu:
        op = doubling(way(gpu, "ours", 1e-6), way(gpu, "torch", 1e-5))
        with told() as lines:
            assert torch.equal(candidates.run(op, X), 2 * X)
            candidates.run(op, torch.ones(5))
        new, broken = lines
        assert "is new here" in new and broken.endswith("which cannot start: processes are not allowed")


@pytest.mark.heavy
def test_a_child_that_ends_at_once_is_no_fault_of_a_way(prober: Prober, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "MODULE", "fastsd.kernels.choice.faults")
    assert prober.faults(dying.OP, (X,), [Way(dying.OP.candidates[1])]) == {}
    assert prober.broken is not None and prober.broken.startswith("it ended the process (exit code 0)")


def test_a_candidate_that_ended_enough_children_is_tried_no_more(prober: Prober) -> None:
    way = Way(dying.OP.candidates[2])
    for lasting in (True, False):
        prober._deaths["dying", "aborts"] = [ProbeFault("as before")] * 2 + [ProbeFault("killed", lasting)]
        told = {"aborts": ProbeFault("it ended 3 processes", lasting)}
        assert prober.faults(dying.OP, (X,), [way]) == told


def test_what_may_lie_elsewhere_is_tried_once_more_by_the_next_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that was killed, for want of memory say, or that did not answer on a busy machine."""
    killed = ProbeFault("it ended the process (SIGKILL)", lasting=False)
    ends = {"ours": killed, "other": killed}
    tried: list[list[str]] = []

    def faults(self: Prober, op: Any, args: Any, ways: list[Way]) -> dict[str, ProbeFault]:
        tried.append([way.label for way in ways])
        return {way.label: ends[way.label] for way in ways if way.label in ends}

    monkeypatch.setattr(Prober, "faults", faults)
    with played(tmp_path, PlayedGpu(), monkeypatch) as gpu:
        op = doubling(way(gpu, "ours", 1e-6), way(gpu, "other", 2e-6), way(gpu, "torch", 1e-5))

        def chosen() -> Any:
            assert torch.equal(candidates.run(op, X), 2 * X)
            return decide.gpu_of(CPU).table.entries["played", key_text(op.key_of((X,)))]

        with told() as lines:
            entry = chosen()
        assert sum("is left out for now: it ended the process (SIGKILL); the next start" in line for line in lines) == 2
        assert entry.candidate == "torch" and set(entry.doubted) == {"ours", "other"} and not entry.excluded
        chosen()  # not in this process
        restart()
        with choosing(ChoiceMode(probe=False)):
            assert chosen().candidate == "torch"  # nor without a process of its own
        assert tried == [["ours", "other"]]
        restart()
        del ends["ours"]
        with told(match="'other' is excluded: it fails in a process of its own again"):
            entry = chosen()
        assert entry.candidate == "ours" and set(entry.excluded) == {"other"} and not entry.doubted
        restart()
        assert chosen() == entry and tried == [["ours", "other"]] * 2


def test_arguments_survive_the_way_to_the_child() -> None:
    view = torch.ones(2, 6, 8, dtype=torch.bfloat16)[:, :, :3].transpose(1, 2)
    args = [torch.ones(2, 3).half(), view, torch.zeros(1, dtype=torch.int64), torch.ones(3, 0), None, True, 2, 1e-5]
    args += [(1, 0, 1, 0), "silu", torch.ones(1, 4).expand(3, 4)]
    there = decoded(encoded(args), CPU)
    assert dying.OP.key_of(there) == dying.OP.key_of(args)
    assert there[7] == 1e-5 and there[0].std() > 0 and torch.equal(there[0], decoded(encoded(args), CPU)[0])
    assert key_text(dying.OP.key_of(args)).startswith(
        "float16 2x3, bfloat16 2x3x6 strides 48x1x8, int64 1, float32 3x0, -, True, 2, float, (1, 0, 1, 0), silu, "
    )


def test_tensors_in_a_tuple_are_part_of_the_key_and_of_the_arguments() -> None:
    """Layer norm's biases: their number and sizes decide, their values do not."""
    from fastsd.kernels.layernorm import OP

    x, vector = torch.ones(2, 8), torch.ones(8)
    args = (x, vector, vector, 1e-5, (vector, 2 * vector), ())
    there = decoded(encoded(args), CPU)
    assert [part.shape for part in there[4]] == [(8,), (8,)] and there[5] == ()
    assert OP.key_of(there) == OP.key_of(args) != OP.key_of((*args[:4], (vector,), ()))
    assert hash(OP.key_of(args)) and "(float32 8, float32 8), ()" in key_text(OP.key_of(args))
