"""Times taken in turns, and the way that is chosen by them. The clock is played."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import hypothesis.strategies as st
import pytest
from hypothesis import given

from fastsd.kernels.choice.measure import HOPELESS, MARGIN, ROUNDS, SLOW, SLOW_ROUNDS, best, times
from fastsd.kernels.choice.op import OpCandidate, Way

WAYS = [Way(OpCandidate(name, lambda: None)) for name in ("ours", "other", "third", "torch")]
OWN = WAYS[-1]


def clocks(columns: Sequence[Sequence[float]], asked: list[int]) -> list[Callable[[], float]]:
    """Samplers that give these numbers, one after the other, and note who was asked."""
    iterators = [iter(column) for column in columns]

    def sampler(i: int) -> Callable[[], float]:
        def sample() -> float:
            asked.append(i)
            return next(iterators[i])

        return sample

    return [sampler(i) for i in range(len(columns))]


def test_ways_take_turns_and_the_median_counts() -> None:
    asked: list[int] = []
    us = [[1e-6, 9e-6, 1.1e-6, 1.2e-6, 1.1e-6], [1.2e-6, 1e-6, 1.3e-6, 1.2e-6, 9e-6]]
    assert times(clocks(us, asked)) == [1.1e-6, 1.2e-6]
    assert asked == [0, 1] * ROUNDS


def test_a_hopeless_way_is_timed_once() -> None:
    asked: list[int] = []
    assert times(clocks([[1e-5] * ROUNDS, [1.01e-5 * HOPELESS], [1.2e-5] * ROUNDS], asked))[1] == 1.01e-5 * HOPELESS
    assert asked.count(1) == 1 and asked.count(0) == asked.count(2) == ROUNDS


def test_slow_calls_take_fewer_rounds_and_one_in_a_hurry() -> None:
    for hurried, rounds in ((False, SLOW_ROUNDS), (True, 1)):
        asked: list[int] = []
        times(clocks([[2 * SLOW] * ROUNDS] * 2, asked), hurried)
        assert asked == [0, 1] * rounds
    asked = []
    times(clocks([[SLOW / 2] * ROUNDS] * 2, asked), hurried=True)
    assert asked == [0, 1] * ROUNDS


def test_where_one_is_left_no_second_round_is_needed() -> None:
    asked: list[int] = []
    assert times(clocks([[3.0], [1.0], [2.0]], asked)) == [3.0, 1.0, 2.0]
    assert len(asked) == 3 and times([]) == []


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ((1.0, 2.0, 2.0, 2.0), "ours"),
        ((2.0, 1.0, 2.0, 2.0), "other"),
        ((2.0, 2.0, 2.0, 1.0), "torch"),
        ((1.0, 0.99, 2.0, 2.0), "ours"),  # a gain below the margin changes nothing
        ((1.0, MARGIN - 0.01, 2.0, 2.0), "other"),
        ((1.01, 2.0, 2.0, 1.0), "torch"),  # but nothing is slower than PyTorch's own op
        ((1.0, 1.0, 1.0, 1.0), "ours"),
    ],
)
def test_the_choice_by_times(seconds: tuple[float, ...], chosen: str) -> None:
    assert best(dict(zip(WAYS, seconds)), OWN).candidate.name == chosen


@given(st.lists(st.floats(1e-7, 1.0), min_size=4, max_size=4))
def test_the_choice_is_never_slower_than_pytorchs_own_op(seconds: list[float]) -> None:
    """And at most the margin slower than the fastest."""
    taken = dict(zip(WAYS, seconds))
    chosen = taken[best(taken, OWN)]
    assert chosen <= taken[OWN] and MARGIN * chosen <= min(seconds)
