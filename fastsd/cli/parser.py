"""argparse, with mistakes answered in one line that names the flag."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from fastsd.errors import FastsdError
from fastsd.parameters import nearest

OUTPUTS = ("out", "output")  # the flags that say where a command writes
# How the metavars of paths begin. An empty one would be the current folder.
PATHS = ("FILE", "PATH", "DIR", "FOLDER", "IMAGE", "IN", "OUT")


class Parser(argparse.ArgumentParser):
    """Raises `FastsdError` where argparse would print its usage and exit. Flags are never abbreviated.

    Args:
        elsewhere: flags of other commands, and where this one has what they say.
    """

    def __init__(self, elsewhere: Mapping[str, str] | None = None, **options: Any):
        super().__init__(allow_abbrev=False, **options)
        self._elsewhere = elsewhere or {}

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """Like `parse_args`; the error about an unknown flag comes before those about missing ones, and names the
        nearest. A text with a space is no flag, as in argparse."""
        for word in itertools.takewhile(lambda word: word != "--", words):
            if word.startswith("--") and " " not in word:
                self._check_known(word.split("=")[0])
        found, unknown = self.parse_known_args(words)
        for name in OUTPUTS:
            if getattr(found, name, None) == "-":
                raise FastsdError("nothing is written to stdout; name a folder or a file", argument=f"--{name}")
        if unknown:
            for word in unknown:
                if word.startswith("-"):
                    self._check_known(word.split("=")[0])
            raise FastsdError(f"{unknown[0]!r} belongs to no flag; a text of several words needs quotes around it")
        return found

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """argparse calls this with the words that an action is given."""
        kind = action.metavar if isinstance(action.metavar, str) else ""
        if "" in arg_strings and kind.split("[")[0] in PATHS:
            flag = next((name for name in action.option_strings if name.startswith("--")), kind)
            raise FastsdError("the path is empty; a variable of the shell may be unset", argument=flag)
        return super()._get_values(action, arg_strings)

    def _check_known(self, flag: str) -> None:
        if flag in self._elsewhere:
            raise FastsdError(f"unknown flag; {self._elsewhere[flag]}", argument=flag)
        if flag not in self._option_string_actions:
            raise FastsdError(f"unknown flag{nearest(flag, self._option_string_actions)}", argument=flag)

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
