"""A step's batch in parts: who computes which samples, from which random numbers, on which thread."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class RandomStreams:
    """The random numbers of one part of a step's batch.

    They depend only on seed, stage, step and part, so checkpoints need no generator state.
    """

    numpy: np.random.Generator
    torch: torch.Generator

    @classmethod
    def create(cls, seed: int, stage: str, step: int, part: int = 0) -> RandomStreams:
        root = np.random.SeedSequence([seed, *stage.encode(), step, part])
        generator = torch.Generator("cpu").manual_seed(int(root.generate_state(1, np.uint64)[0] >> 1))
        return cls(np.random.default_rng(root), generator)


@dataclass(frozen=True)
class Part:
    """The samples that one worker computes at a time.

    Attributes:
        step: number of finished steps.
        index: of the part in the step, over all workers and processes.
        first, size: its samples in the step's batch. of: samples of the whole batch.
        random: the source of all its random numbers.
        validation: it is a part of the validation, not of a step.
    """

    step: int
    index: int
    first: int
    size: int
    of: int
    random: RandomStreams
    validation: bool = False


def split(seed: int, stage: str, step: int, batch_size: int, count: int, validation: bool = False) -> list[Part]:
    """A batch in at most `count` parts of nearly equal size."""
    parts, first = [], 0
    for index, size in enumerate(split_evenly(batch_size, count)):
        streams = RandomStreams.create(seed, stage, step, index)
        parts.append(Part(step, index, first, size, batch_size, streams, validation))
        first += size
    return parts


def split_evenly(total: int, parts: int) -> list[int]:
    """Split `total` into at most `parts` positive sizes that differ by at most one."""
    parts = min(total, parts)
    return [total // parts + (i < total % parts) for i in range(parts)]


class Workers:
    """Data-parallel threads, for use in a `with` statement. Each thread runs its operations on a single core.

    Two threads that split every operation synchronise some hundred times per step. On a busy machine each wait costs a
    time slice: 5 to 11 seconds per step were measured, instead of 0.7. Two threads that split the batch synchronise
    once per step.
    """

    def __init__(self, count: int):
        self.count = count

    def __enter__(self) -> Workers:
        self._threads_before = torch.get_num_threads()
        torch.set_num_threads(1)
        self._pool = ThreadPoolExecutor(self.count, initializer=torch.set_num_threads, initargs=(1,))
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._threads_before)

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """Results in the order of `items`."""
        return list(self._pool.map(function, items))


@contextmanager
def training_numerics(device: torch.device) -> Iterator[None]:
    """Deterministic algorithms, and on the CPU the attention backend that is fastest for at most 64 tokens.

    PyTorch's fused CPU attention takes 43 % of a bf16 training step at 64 tokens; the math backend makes the step 1.5
    times as fast (measured on a Zen 5 core). On a GPU, an operation without a deterministic form runs all the same, and
    PyTorch warns of it.
    """
    deterministic: Any = torch.utils.deterministic  # the module replaces its class at run time; mypy cannot see that
    before = torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=device.type != "cpu")
    deterministic.fill_uninitialized_memory = False
    try:
        with sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext():
            yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        deterministic.fill_uninitialized_memory = before[1]
