"""What fastsd's kernels and graphs warn of in the log: expected by a test, or else an error."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

LOGGERS = ("fastsd.kernels", "fastsd.graph")


class StrictHandler(logging.Handler):
    """Raises where a warning is logged that nobody listens to, as `-W error` does for Python's."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.listeners: list[list[str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        if not self.listeners:
            raise AssertionError(f"{record.name} warned, which no test expects: {record.getMessage()}")
        self.listeners[-1].append(record.getMessage())


_strict = StrictHandler()


def be_strict() -> None:
    """Make an unexpected warning an error, in this process."""
    for name in LOGGERS:
        logging.getLogger(name).addHandler(_strict)


@contextmanager
def heard() -> Iterator[list[str]]:
    """The warnings that are logged within the context, if any."""
    lines: list[str] = []
    _strict.listeners.append(lines)
    try:
        yield lines
    finally:
        _strict.listeners.remove(lines)


@contextmanager
def told(match: str = "") -> Iterator[list[str]]:
    """The warnings that are logged within the context: one at least, and each of them matches a regular expression."""
    with heard() as lines:
        yield lines
    assert lines and all(re.search(match, line) for line in lines), (match, lines)
