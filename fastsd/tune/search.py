"""The search: correct first, then fast; the committed launch stays unless another is clearly faster."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Clock = Callable[[Sequence[Callable[[], Any]]], list[float]]

FINALISTS = 4
MARGIN = 0.97  # of the committed launch's time: what a new one has to stay under; medians vary by a percent or two


@dataclass(frozen=True)
class Found:
    """The launch that won, its time and the committed one's in seconds, and how many of the candidates were right."""

    launch: Any
    seconds: float
    committed_seconds: float
    right: int
    tried: int


def search(
    candidates: Sequence[Any], correct: Callable[[Any], bool], run: Callable[[Any], Any], clock: Clock
) -> Found | None:
    """The fastest of `candidates` that computes the right thing; the first is the committed one.

    Each is timed alone; the `FINALISTS` fastest meet the committed one in rounds in which they take turns. A candidate
    that does not compile or does not fit the GPU drops out. None where the committed one itself is not right.
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
            if _of_the_device(error):
                raise
    finalists = [others[i] for _, i in sorted(alone)[:FINALISTS]]
    committed_seconds, *seconds = timed([committed, *finalists])
    best, launch = min(zip(seconds, finalists), key=lambda pair: pair[0], default=(committed_seconds, committed))
    if best >= MARGIN * committed_seconds:
        best, launch = committed_seconds, committed
    return Found(launch, best, committed_seconds, 1 + len(alone), len(candidates))


def _of_the_device(error: Exception) -> bool:
    """Whether the GPU itself failed (an illegal access), after which nothing runs in this process."""
    return "CUDA error" in str(error)
