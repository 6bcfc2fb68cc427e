"""Numbers as clients send them: JSON has one kind, and a form has texts. One rule for every field of both APIs.

A whole number may be sent as 2, 2.0 or "2"; true and false are no numbers.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

from fastsd.errors import FastsdError
from fastsd.parameters.kinds import Kind, Number, Whole


def as_whole(value: Any) -> Any:
    """A value as an int if it is a whole number; everything else as it is."""
    if isinstance(value, str):
        try:
            return int(value)  # exact, where a float would round a large seed
        except ValueError:
            pass
        try:
            value = float(value)
        except ValueError:
            return value
    return int(value) if isinstance(value, float) and value.is_integer() else value


def check(kind: Kind, value: Any) -> Any:
    """A field's value as a parameter of this kind takes it.

    Raises:
        FastsdError: it is none; the caller adds the argument.
    """
    if isinstance(kind, Whole):
        value = as_whole(value)
    elif isinstance(kind, Number) and isinstance(value, list):  # one for each prompt, of which a request has one
        raise FastsdError(f"it should be {kind}", value=value)
    return kind.parse(value) if isinstance(value, str) else kind.check(value)


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("float_type", "it should be a number")
    return value


def _whole(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("int_type", "it should be a whole number")
    return as_whole(value)


WholeField = Annotated[int, BeforeValidator(_whole)]
NumberField = Annotated[float, BeforeValidator(_no_bool)]
