"""argparse, with mistakes answered in one line that names the flag."""

from __future__ import annotations

import argparse
import difflib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from fastsd.errors import FastsdError


class Parser(argparse.ArgumentParser):
    """Raises `FastsdError` where argparse would print its usage and leave. Flags are never abbreviated."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """What `parse_args` does; for an unknown flag the nearest one is named."""
        found, unknown = self.parse_known_args(words)
        if unknown:
            flag = next((word.split("=")[0] for word in unknown if word.startswith("-")), None)
            if flag is not None:
                raise FastsdError(f"{flag}: unknown flag{nearest(flag, self._option_string_actions)}")
            raise FastsdError(f"{unknown[0]!r} belongs to no flag; a text of several words needs quotes around it")
        return found

    def error(self, message: str) -> NoReturn:
        """argparse calls this with "argument --steps: ..."."""
        message = message.removeprefix("argument ")
        if message.endswith("expected one argument"):
            names = message.split(":")[0].split("/")
            flag = next((name for name in names if name.startswith("--")), names[0])
            message = f"{flag}: takes a value; one that starts with a dash is written {flag}=VALUE"
        raise FastsdError(message)


def nearest(word: str, known: Iterable[str]) -> str:
    """ "; did you mean --steps?", or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def one_line(text: str) -> str:
    """`text` with line breaks and other control characters shown rather than obeyed."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text.strip())


def whole(low: int, high: int) -> Callable[[str], int]:
    """An argparse type: a whole number from `low` to `high`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{_short(text)} should be a whole number from {low} to {high}")
        return value

    return parse


def real(low: float, high: float) -> Callable[[str], float]:
    """An argparse type: a finite number from `low` to `high`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:  # neither holds for NaN
            raise argparse.ArgumentTypeError(f"{_short(text)} should be a number from {low:g} to {high:g}")
        return value

    return parse


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
