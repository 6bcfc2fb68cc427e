"""Replayed kernels: captured once, after the correctness check; work that cannot be captured runs eagerly."""

from __future__ import annotations

import pytest
import torch

from bench.bench_kernels import CASES, Case, Replayed
from bench.measure import Candidate, run_candidates
from tests.support.tape import TapeRecorder

CPU = torch.device("cpu")


def test_work_is_captured_once_and_replayed_for_each_sample() -> None:
    calls: list[int] = []

    def work() -> list[torch.Tensor]:
        calls.append(1)
        return [torch.ones(2) + i for i in range(4)]

    recorder = TapeRecorder()
    replayed = Replayed(work, recorder)
    candidate = Candidate("x", lambda i: torch.ones(2), replayed.prepare, timed=replayed, repeats=4)
    (outcome,) = run_candidates(lambda: torch.ones(2), [candidate], 0.1, CPU, 5.0, max_rounds=6)
    assert outcome.spread and outcome.spread.rounds == 6
    assert recorder.recorded == 1 and len(calls) == 2  # the warm-up and the capture
    assert [int(x[0]) for x in replayed(0)] == [1, 2, 3, 4]


def test_a_failed_check_captures_nothing_and_a_failed_capture_runs_eagerly() -> None:
    recorder = TapeRecorder()
    replayed = Replayed(lambda: torch.ones(1), recorder)
    wrong = Candidate("x", lambda i: torch.zeros(2), replayed.prepare, timed=replayed)
    run_candidates(lambda: torch.ones(2), [wrong], 0.1, CPU, 1.0)
    assert recorder.recorded == 0
    failing = TapeRecorder(fail=[RuntimeError("not permitted when capturing")] * 2)
    eager = Replayed(lambda: torch.ones(1), failing)
    for _ in range(3):
        eager.prepare()
    assert eager(0) == 1 and len(failing.fail) == 1  # one attempt


def test_the_names_of_the_cases_are_unique() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ops_of_a_case_give_the_same_shape_and_the_work_covers_its_tensors(case: Case) -> None:
    """On the meta device. The elements of the work are at least those of the output, and the first input."""
    inputs = [torch.empty(shape, device="meta") for shape in case.shapes]
    shapes = {case.read(plain(*inputs)).shape for plain in case.plain.values()}
    (shape,) = shapes
    assert case.work.elements >= shape.numel() + torch.Size(case.shapes[0]).numel()
    assert (case.work.flops > 0) != (case.work.kind == "norm")
