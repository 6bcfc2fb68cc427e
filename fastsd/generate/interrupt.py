"""diffusers' `pipe._interrupt = True`: it ends calls after their current step, those alone that it is meant for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(eq=False)
class Run:
    """A call between its first step and its last."""

    interrupted: bool = False


_OF_CALLBACK: ContextVar[Run | None] = ContextVar("run", default=None)


@contextmanager
def callback_of(run: Run) -> Iterator[None]:
    """Inside, `_interrupt` is this run's."""
    token = _OF_CALLBACK.set(run)
    try:
        yield
    finally:
        _OF_CALLBACK.reset(token)


class Interruptible:
    """What has runs that can be ended."""

    _runs: list[Run]

    def _meant(self) -> list[Run]:
        """The run whose callback asks; from elsewhere all that are under way."""
        own = _OF_CALLBACK.get()
        return [own] if own in self._runs and own is not None else list(self._runs)

    @property
    def _interrupt(self) -> bool:
        return any(run.interrupted for run in self._meant())

    @_interrupt.setter
    def _interrupt(self, value: bool) -> None:
        for run in self._meant():
            run.interrupted = bool(value)
