"""The one exception that fastsd raises for bad input, and the one place that words it."""

from __future__ import annotations

import difflib
import functools
import inspect
import os
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])


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
    text = " ".join(repr(value).split())  # arrays print lines
    return text if len(text) <= 60 else f"{text[:57]}..."


def nearest(word: str, known: Collection[str]) -> str:
    """ "; did you mean steps?", or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def nearest_or_all(word: str, known: Collection[str], also: Collection[str] = ()) -> str:
    """As `nearest`; where none is near: "; it takes path, unet, text". `also`: names that are not listed."""
    return nearest(word, [*known, *also]) or f"; it takes {', '.join(known)}"


# What an argument may be, by its annotation; arguments of other annotations are checked where they are used.
_PATH, _NONE = (str, os.PathLike), type(None)
_TYPES: dict[object, tuple[tuple[type, ...], str]] = {
    "bool": ((bool,), "True or False"),
    "Path": (_PATH, "a path"),
    "str | Path": (_PATH, "a path or a hub id"),
    "str | Path | None": ((*_PATH, _NONE), "a path or a hub id"),
    "str | None": ((str, _NONE), "a text"),
}


def named_arguments(function: F) -> F:
    """A function, or a class of that constructor, that refuses unknown arguments with the nearest name, and flags,
    paths and texts that are none: a text "False" would count as true."""
    if isinstance(function, type):
        setattr(function, "__init__", named_arguments(vars(function)["__init__"]))  # noqa: B010
        return cast(F, function)
    parameters = inspect.signature(function).parameters
    takes_more = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    known = [name for name in parameters if name not in ("self", "cls")]
    placed = [name for name, each in parameters.items() if each.kind is each.POSITIONAL_OR_KEYWORD]
    types = {name: _TYPES[own.annotation] for name, own in parameters.items() if own.annotation in _TYPES}

    @functools.wraps(function)
    def checked(*arguments: Any, **named: Any) -> Any:
        if len(arguments) > len(placed):
            own = ", ".join(name for name in placed if name not in ("self", "cls"))
            raise FastsdError(f"only {own} may stand without a name; name the other arguments")
        for name in named:
            if name not in known and not takes_more:
                raise FastsdError(f"no such argument{nearest_or_all(name, known)}", argument=name)
        for name, value in (*zip(parameters, arguments, strict=False), *named.items()):
            if name in types and not isinstance(value, types[name][0]):
                raise FastsdError(f"it should be {types[name][1]}", argument=name, value=value)
        return function(*arguments, **named)

    return cast(F, checked)


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
