"""argparse, with mistakes answered in one line that names the flag."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from fastsd.errors import FastsdError
from fastsd.parameters import nearest


class Parser(argparse.ArgumentParser):
    """Raises `FastsdError` where argparse would print its usage and exit. Flags are never abbreviated."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """Like `parse_args`; the error about an unknown flag names the nearest one."""
        found, unknown = self.parse_known_args(words)
        if unknown:
            flag = next((word.split("=")[0] for word in unknown if word.startswith("-")), None)
            if flag is not None:
                raise FastsdError(f"unknown flag{nearest(flag, self._option_string_actions)}", argument=flag)
            raise FastsdError(f"{unknown[0]!r} belongs to no flag; a text of several words needs quotes around it")
        return found

    def error(self, message: str) -> NoReturn:
        """argparse calls this with "argument -s/--steps: ..."."""
        names, _, rest = message.removeprefix("argument ").partition(": ")
        flag = next((name for name in names.split("/") if name.startswith("--")), names.split("/")[0])
        if rest == "expected one argument":
            rest = f"takes a value; one that starts with a dash is written {flag}=VALUE"
        if not rest or not flag.startswith("-"):
            raise FastsdError(message)
        raise FastsdError(rest, argument=flag)


def one_line(text: str) -> str:
    """`text` with line breaks and other control characters escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text.strip())
