"""How far a figure would scatter with other images of the same model: the bootstrap (Efron 1979)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Figure:
    """A figure with the interval that holds it with 95 % confidence; without rounds, the interval is None."""

    value: float
    low: float | None = None
    high: float | None = None


def bootstrap(
    statistic: Callable[[NDArray[np.int64]], float], count: int, rounds: int, seed: int, share: bool = False
) -> Figure:
    """A statistic of `count` generated images, and its interval over `rounds` draws of as many with replacement.

    The interval is that of the draws, moved so that their mean is the figure: FID grows with repeated images, and the
    draws of it lie above it as a whole. The real images stay as they are.

    Args:
        statistic: of the indices of the images to take. rounds: 0 for none.
        share: it lies between 0 and 1, and so does its interval.
    """
    every = np.arange(count, dtype=np.int64)
    value = statistic(every)
    if not rounds:
        return Figure(value)
    generator = np.random.default_rng(seed)
    draws = np.array([statistic(np.sort(generator.integers(count, size=count))) for _ in range(rounds)])
    low, high = np.quantile(draws - draws.mean(), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    low, high = value + float(low), value + float(high)
    return Figure(value, max(low, 0.0), min(high, 1.0)) if share else Figure(value, low, high)
