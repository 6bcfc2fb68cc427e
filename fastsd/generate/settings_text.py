"""Settings of a call as a text: "steps=4 guidance=2"."""

from __future__ import annotations

import shlex
from typing import Any

from fastsd.errors import FastsdError, about, nearest
from fastsd.parameters import PARAMETERS

# A measurement sets these itself.
OWN = ("prompt", "seed", "batch_size", "output_type", "return_dict")


def parse_settings(text: str, argument: str) -> dict[str, Any]:
    """The arguments of `Pipeline.__call__` that a text of NAME=VALUE pairs gives; names as in Python or of the flag.

    Args:
        argument: the flag that it came from, which errors are about.

    Raises:
        FastsdError: no pair, an unknown name, a value out of range.
    """
    rows = {row.name: row for row in PARAMETERS.values() if row.of == "call" and row.flags and row.name not in OWN}
    named = rows | {flag.lstrip("-").replace("-", "_"): row for row in rows.values() for flag in row.flags}
    found: dict[str, Any] = {}
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise FastsdError("a quotation mark has no end", argument=argument, value=text) from error
    for word in words:
        name, equals, value = word.partition("=")
        name = name.strip().replace("-", "_")
        if not equals:
            raise FastsdError('it should be pairs such as "steps=4 guidance=2"', argument=argument, value=text)
        if name not in named:
            raise FastsdError(f"{name!r} is no setting of a call{nearest(name, named)}", argument=argument)
        with about(argument):
            found[named[name].name] = named[name].kind.parse(value)
    return found
