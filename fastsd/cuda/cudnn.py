"""cuDNN's switches while our convolutions run.

`benchmark`: a shape's first call measures cuDNN's plans and keeps the fastest, per thread, as long as the process
lives. `deterministic`: among the plans that sum in a fixed order, so that the same seed is the same image; a plan that
splits a sum and adds the parts as they come may be faster on the smallest maps, and is not taken.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

OURS = (True, True)  # benchmark, deterministic


class _Switches:
    """The process has one set of switches. The first pipeline that needs them sets them, the last one restores them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._before = OURS

    def take(self) -> None:
        with self._lock:
            found = _read()
            if self._users == 0 or found != OURS:  # with users, the caller has set them meanwhile
                self._before = found
            self._users += 1
            _write(OURS)

    def give_back(self) -> None:
        with self._lock:
            found = _read()
            if found != OURS:
                self._before = found
            self._users -= 1
            _write(OURS if self._users else self._before)


def _read() -> tuple[bool, bool]:
    return torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic


def _write(values: tuple[bool, bool]) -> None:
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = values


_switches = _Switches()


@contextmanager
def fixed_convolutions(device: torch.device) -> Iterator[None]:
    """Inside this context cuDNN measures its algorithms at a shape's first call, among those that sum in a fixed order.

    It holds with graphs and without, so that both compute the same. The switches apply to the whole process: other
    threads' convolutions run with them too, until the last pipeline has left; then they are the caller's again.
    """
    if device.type != "cuda":
        yield
        return
    _switches.take()
    try:
        yield
    finally:
        _switches.give_back()
