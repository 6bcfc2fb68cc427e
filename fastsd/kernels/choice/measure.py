"""The time of each way to compute a call, in turns, and which way to choose by the times."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from fastsd.kernels.choice.op import Way

Sampler = Callable[[], float]

ROUNDS, SLOW_ROUNDS = 5, 2
SLOW = 1e-3  # seconds of a call from which fewer rounds are enough: it is long beside what makes times vary
HOPELESS = 1.3  # a way that took more than this share of the fastest one's time in the first round is timed no more
MARGIN = 0.97  # a later way must take less than this share of an earlier one's time: medians vary by a percent or two


class Machine(Protocol):
    """A device that can take times, and what identifies it."""

    def identity(self, device: torch.device) -> dict[str, Any]:
        """What times on `device` are valid for: the GPU, its architecture class, versions of what computes."""
        ...

    def measures(self, x: torch.Tensor) -> bool:
        """Whether calls on tensors like `x` can be timed."""
        ...

    def capturing(self) -> bool:
        """Whether a graph is being captured, so that nothing may be timed or waited for."""
        ...

    def synchronize(self, device: torch.device) -> None:
        """Wait for the device; it raises what went wrong there."""
        ...

    def sampler(self, run: Callable[[], Any]) -> Sampler:
        """A function that takes the time of a call of `run` once more, in seconds."""
        ...

    def release(self) -> None:
        """Free what samplers held."""
        ...


def times(samplers: Sequence[Sampler], hurried: bool = False) -> list[float]:
    """Seconds of each: medians over rounds in which all take turns; of a hopeless one, those of the first round.

    Args:
        hurried: slow calls get no second round.
    """
    samples = [[sample()] for sample in samplers]
    fastest = min((column[0] for column in samples), default=math.inf)
    left = [i for i, column in enumerate(samples) if column[0] <= HOPELESS * fastest]
    if len(left) > 1:
        rounds = ROUNDS if fastest < SLOW else 1 if hurried else SLOW_ROUNDS
        for _ in range(rounds - 1):
            for i in left:
                samples[i].append(samplers[i]())
    return [statistics.median(column) for column in samples]


def best(seconds: Mapping[Way, float], own: Way) -> Way:
    """The way to choose: the first that is nearly as fast as the fastest, and not slower than PyTorch's own op.

    Args:
        seconds: of each way, in the order of preference.
        own: PyTorch's own op, one of them.
    """
    fastest = min(seconds.values())
    return next(way for way, time in seconds.items() if MARGIN * time <= fastest and time <= seconds[own])
