"""Kernels replayed for the clock: captured once, after the gate; what cannot be captured is run as it is."""

from __future__ import annotations

import pytest
import torch

from bench.bench_kernels import CASES, Replayed
from bench.measure import Candidate, hold
from tests.support.tape import TapeRecorder


def test_work_is_captured_once_and_replayed_for_each_sample() -> None:
    calls: list[int] = []

    def work() -> list[torch.Tensor]:
        calls.append(1)
        return [torch.ones(2) + i for i in range(4)]

    recorder = TapeRecorder()
    whole = Replayed(work, recorder)
    candidate = Candidate("x", lambda i: torch.ones(2), whole.prepare, timed=whole, repeats=4)
    (outcome,) = hold(lambda: torch.ones(2), [candidate], 0.1, torch.device("cpu"), 5.0, rounds=6)
    assert outcome.spread and outcome.spread.rounds == 6
    assert recorder.recorded == 1 and len(calls) == 2  # its warm-up and the recording
    assert [int(x[0]) for x in whole(0)] == [1, 2, 3, 4]


def test_a_red_gate_captures_nothing_and_a_failed_capture_runs_as_it_is() -> None:
    recorder = TapeRecorder()
    whole = Replayed(lambda: torch.ones(1), recorder)
    wrong = Candidate("x", lambda i: torch.zeros(2), whole.prepare, timed=whole)
    hold(lambda: torch.ones(2), [wrong], 0.1, torch.device("cpu"), 1.0)
    assert recorder.recorded == 0
    failing = Replayed(lambda: torch.ones(1), TapeRecorder(fail=[RuntimeError("not permitted when capturing")] * 2))
    for _ in range(3):
        failing.prepare()
    assert failing(0) == 1 and len(failing.recorder.fail) == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_kernel_has_work_and_something_beside_it(case: object) -> None:
    assert case.work.elements > 0 and case.plain  # type: ignore[attr-defined]
