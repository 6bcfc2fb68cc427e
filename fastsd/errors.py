"""The one exception that fastsd raises for bad input, and the one place that words it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class FastsdError(ValueError):
    """Bad input: which argument or file it is about, and what would be right.

    Attributes:
        message: what would be right. `{name}` in it stands for another argument.
        argument: the argument that is wrong, as Python calls it: "width", "controls[0].weight"; or None.
        value: what it was, where that helps; or None.
        path: the file, folder or hub id that is wrong, or None.

    `str(error)` is one line for Python; `describe` words it for a command line or a server. It is a `ValueError`, so
    callers who know nothing of fastsd catch it as one. Programming errors inside fastsd are never wrapped in it.
    """

    def __init__(
        self,
        message: str,
        *,
        argument: str | None = None,
        value: object = None,
        path: object = None,
    ):
        super().__init__(message)
        self.message, self.argument, self.value, self.path = message, argument, value, path

    def __str__(self) -> str:
        return describe(self)


def describe(error: FastsdError, name: Callable[[str], str] = str) -> str:
    """An error in one line: "width is 63; it should be ...", "vae x.safetensors: no such file".

    Args:
        name: turns an argument's name into what the user calls it, such as a flag.
    """
    message = _ARGUMENT.sub(lambda found: name(found[1]), error.message)
    subject = name(error.argument) if error.argument is not None else ""
    if error.value is not None:
        return f"{subject} is {_shortened(error.value)}; {message}"
    where = f"{subject} {error.path or ''}".strip()
    return f"{where}: {message}" if where else message


_ARGUMENT = re.compile(r"\{([a-z]\w*)\}")


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@contextmanager
def about(argument: str | None = None, path: object = None) -> Iterator[None]:
    """Errors raised inside are about this argument and this file, unless they name others."""
    try:
        yield
    except FastsdError as error:
        if error.argument is None:
            error.argument = argument
        if error.path is None:
            error.path = path
        raise
