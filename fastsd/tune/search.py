"""The search for a launch: correct first, then fast. The committed launch is kept unless another is clearly faster."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Clock = Callable[[Sequence[Callable[[], Any]]], list[float]]

FINALISTS = 4
MARGIN = 0.97  # a new launch must take less than this share of the committed time; medians vary by a percent or two


@dataclass(frozen=True)
class SearchResult:
    """The selected launch, its time and the committed launch's in seconds, and the numbers of candidates."""

    launch: Any
    seconds: float
    committed_seconds: float
    correct: int
    candidates: int


def search(
    candidates: Sequence[Any], correct: Callable[[Any], bool], run: Callable[[Any], Any], clock: Clock
) -> SearchResult | None:
    """The fastest correct launch of `candidates`, of which the first is the committed one.

    Each is timed alone; then the `FINALISTS` fastest and the committed one are timed in turns. A candidate that does
    not compile or does not fit the GPU is rejected. None if the committed launch itself is wrong.
    """

    def timed(launches: Sequence[Any]) -> list[float]:
        return clock([functools.partial(run, launch) for launch in launches])

    committed, *others = candidates
    if not correct(committed):
        return None
    alone: list[tuple[float, int]] = []
    for i, launch in enumerate(others):
        try:
            if correct(launch):
                alone.append((timed([launch])[0], i))
        except Exception as error:
            if _device_is_lost(error):
                raise
    finalists = [others[i] for _, i in sorted(alone)[:FINALISTS]]
    committed_seconds, *seconds = timed([committed, *finalists])
    best, launch = min(zip(seconds, finalists), key=lambda pair: pair[0], default=(committed_seconds, committed))
    if best >= MARGIN * committed_seconds:
        best, launch = committed_seconds, committed
    return SearchResult(launch, best, committed_seconds, 1 + len(alone), len(candidates))


def _device_is_lost(error: Exception) -> bool:
    """Whether the GPU itself failed, for example by an illegal access; no later call in this process can succeed."""
    return "CUDA error" in str(error)
