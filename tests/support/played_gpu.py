"""A GPU that is played on the CPU: how long each way takes is stated, and how often it was asked is counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsd.kernels import candidates
from fastsd.kernels.candidates import GpuOp, OpCandidate
from fastsd.kernels.choice import decide, table

IDENTITY = {
    "gpu": "NVIDIA H200 (played)",
    "architecture": 90,
    "driver": "1.2.3",
    "torch": "2.13.0",
    "triton": "3.7.1",
    "fastsd": "0.1.0",
    "kernels": "abc",
}


class PlayedGpu:
    """Times calls of played candidates by what those state; nothing waits, and captures are played too.

    Attributes:
        spent: seconds on the device, all in all.
        sampled: how many ways were timed.
    """

    def __init__(self, **identity: Any) -> None:
        self.about = {**IDENTITY, **identity}
        self.spent, self.sampled, self.waits, self.is_capturing = 0.0, 0, 0, False
        self.takes = 0.0  # seconds of the candidate that ran last
        self.noise: Iterator[float] | None = None

    def identity(self, device: torch.device) -> dict[str, Any]:
        return dict(self.about)

    def measures(self, x: torch.Tensor) -> bool:
        return True

    def capturing(self) -> bool:
        return self.is_capturing

    def synchronize(self, device: torch.device) -> None:
        assert not self.is_capturing
        self.waits += 1

    def sampler(self, run: Callable[[], Any]) -> Callable[[], float]:
        assert not self.is_capturing
        self.sampled += 1

        def sample() -> float:
            run()
            seconds = self.takes * (1.0 if self.noise is None else next(self.noise))
            self.spent += seconds
            return seconds

        return sample

    def release(self) -> None:
        pass


@contextmanager
def played(folder: Path, gpu: PlayedGpu, patch: pytest.MonkeyPatch) -> Iterator[PlayedGpu]:
    """Inside this context choices are made by this GPU, and kept in `folder`; none come with fastsd."""
    with patch.context() as inner:
        inner.setenv("FASTSD_CACHE", str(folder / "cache"))
        inner.setattr(table, "COMMITTED", folder / "committed")
        inner.setattr(decide, "machine", gpu)
        candidates.forget()
        yield gpu
        candidates.forget()


def restart() -> None:
    """As if the process ended and another one began."""
    for gpu in decide._gpus.values():
        gpu.save()
    candidates.forget()


def way(
    gpu: PlayedGpu,
    name: str,
    seconds: float,
    offset: float = 0.0,
    fault: BaseException | None = None,
    calls: list[str] | None = None,
    **options: Any,
) -> OpCandidate:
    """A candidate that takes so long, and adds `offset` to what doubling x gives, or raises."""

    def run(x: torch.Tensor, launch: Any = None) -> torch.Tensor:
        if calls is not None:
            calls.append(name if launch is None else f"{name} {launch}")
        if fault is not None:
            raise fault
        gpu.takes = seconds if launch is None else launch.seconds
        return 2 * x + offset

    return OpCandidate(name, run, **options)


def doubling(*ways: OpCandidate, name: str = "played") -> GpuOp:
    """The op that doubles x, with these candidates."""
    return GpuOp(name, lambda x: 2 * x, ways)
