"""Says where a run stands when it does not move: a disk that hangs, a process that has ended."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

PACKAGE = Path(__file__).parent.parent
# What waits for whom, by the module in which a thread stands.
REASONS = {
    "processes.py": "another process does not answer; see what it printed last",
    "captioned.py": "an image is read or decoded; the disk of data.path may hang",
    "sources.py": "an image is read; the disk of data.path may hang",
    "packed.py": "an image is read; the disk of data.path may hang",
    "arrow.py": "an image is read; the disk of data.path may hang",
    "checkpoint.py": "a checkpoint is written; the disk of `out` may hang or be full",
}


class StallWatch:
    """Reports when no step has been finished for long, and after twice the time again. Use it in a `with` statement.

    A thread of its own looks; nothing is stopped, since a machine that is busy or asleep looks the same.
    """

    def __init__(self, minutes: float, report: Callable[[str], None]):
        """`minutes`: without a step, before it is said; 0: never."""
        self.minutes, self.report = minutes, report
        self._moved, self._said, self._what = time.monotonic(), 1, ""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> StallWatch:
        if self.minutes:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self.minutes:
            self._thread.join()

    def moved(self, what: str) -> None:
        """A step is finished; `what` comes next."""
        self._moved, self._said, self._what = time.monotonic(), 1, what

    def _look(self) -> None:
        while not self._ended.wait(self.minutes * 60 / 10):
            waited = (time.monotonic() - self._moved) / 60
            if waited >= self.minutes * self._said:
                self._said *= 2
                self.report(f"{self._what} has not been finished for {waited:.3g} min: {_where()}")


def _where() -> str:
    """The innermost place in this package of every thread but this one, and what it tells."""
    places, reasons = [], []
    for number, frame in sys._current_frames().items():
        place = _own(frame) if number != threading.get_ident() else None
        if place is not None:
            file = Path(place.f_code.co_filename)
            text = f"{file.relative_to(PACKAGE.parent).as_posix()}:{place.f_lineno} ({place.f_code.co_name})"
            places += [text] if text not in places else []
            reasons += [REASONS[file.name]] if file.name in REASONS else []
    return ", ".join(places) + ("; " + reasons[0] if reasons else "")


def _own(frame: FrameType | None) -> FrameType | None:
    while frame is not None and not Path(frame.f_code.co_filename).is_relative_to(PACKAGE):
        frame = frame.f_back
    return frame
