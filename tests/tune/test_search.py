"""The search, with a fake clock: the time of a launch is its own number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from fastsd.tune.search import FINALISTS, MARGIN, SearchResult, search


class FakeClock:
    """Seconds are what a run returns; records which runs were timed together."""

    def __init__(self) -> None:
        self.rounds: list[list[float]] = []

    def __call__(self, runs: Sequence[Callable[[], Any]]) -> list[float]:
        self.rounds.append([run() for run in runs])
        return self.rounds[-1]


def search_numbers(launches: Sequence[float], correct: Callable[[float], bool] = lambda _: True) -> SearchResult | None:
    return search(launches, correct, lambda launch: launch, FakeClock())


def winner(launches: Sequence[float], correct: Callable[[float], bool] = lambda _: True) -> float:
    result = search_numbers(launches, correct)
    assert result is not None
    return result.launch


def test_the_fastest_correct_launch_wins() -> None:
    result = search_numbers([10.0, 3.0, 2.0, 5.0], lambda launch: launch != 2.0)
    assert result == SearchResult(3.0, 3.0, 10.0, correct=3, candidates=4)


def test_a_gain_below_the_margin_is_not_enough() -> None:
    assert winner([10.0, 10 * MARGIN + 0.1]) == 10.0
    assert winner([10.0, 10 * MARGIN - 0.1]) == 10 * MARGIN - 0.1


def test_without_other_candidates_the_committed_launch_is_kept() -> None:
    assert winner([10.0]) == 10.0


def test_there_is_no_result_if_the_committed_launch_is_wrong() -> None:
    assert search_numbers([10.0, 1.0], lambda launch: launch != 10.0) is None


def test_a_failing_launch_is_rejected_and_a_lost_gpu_ends_the_search() -> None:
    def failing(message: str) -> Callable[[float], bool]:
        def correct(launch: float) -> bool:
            if launch == 1.0:
                raise RuntimeError(message)
            return True

        return correct

    assert winner([10.0, 1.0, 5.0], failing("out of resource: shared memory")) == 5.0
    with pytest.raises(RuntimeError, match="illegal"):
        search_numbers([10.0, 1.0], failing("CUDA error: an illegal memory access was encountered"))


def test_a_wrong_launch_is_never_timed_and_the_finalists_are_timed_with_the_committed_launch() -> None:
    clock = FakeClock()
    search([10.0, *(float(n) for n in range(1, 9))], lambda launch: launch != 1.0, lambda launch: launch, clock)
    assert all(1.0 not in times for times in clock.rounds)
    assert clock.rounds[-1] == [10.0, *(float(n) for n in range(2, 2 + FINALISTS))]
