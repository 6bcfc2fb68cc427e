"""What the command line says on standard output, and what happens where it cannot be written."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, TextIO, cast


class UnsaidError(Exception):
    """Standard output cannot be written. It is no OSError, which argparse would pass over in silence."""

    def __init__(self, error: OSError):
        super().__init__(str(error))
        self.error = error


class CheckedOutput:
    """A text stream whose errors are `UnsaidError`."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            raise UnsaidError(error) from error

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            raise UnsaidError(error) from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class PathsSaid:
    """A line for each image. Where it cannot be written, all images are generated and saved all the same."""

    def __init__(self) -> None:
        self._error: UnsaidError | None = None

    def say(self, path: Path) -> None:
        from tqdm import tqdm

        if self._error is None:
            try:
                tqdm.write(str(path), file=sys.stdout)
                sys.stdout.flush()
            except UnsaidError as error:
                self._error = error

    def end(self) -> None:
        """After the last image.

        Raises:
            UnsaidError: standard output could not be written.
        """
        if self._error is not None:
            raise self._error


@contextmanager
def checked_output() -> Iterator[None]:
    """Inside, standard output raises `UnsaidError`. A daemon's program may have none: what is said is then lost."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a path may hold characters that the terminal's encoding lacks
            stream.reconfigure(errors="backslashreplace")
    with redirect_stdout(cast(TextIO, CheckedOutput(sys.stdout))):
        yield


def silence() -> None:
    """Throw away what standard output holds back, or Python complains when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
