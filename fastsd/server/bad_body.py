"""What is wrong with a body that does not fit its model, in one line of this project's words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic_core import PydanticCustomError

MAX_DEPTH = 64  # of lists and objects in one another
TOO_DEEP = f"it is nested too deeply; at most {MAX_DEPTH} levels are read"
# What would be right, by the beginning of pydantic's type of error.
EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string_type": "a text",
    "string_unicode": "valid Unicode",
    "greater_than_equal": "at least {ge}",
    "less_than_equal": "at most {le}",
    "list": "a list",
    "tuple": "a list",
    "dict": "an object",
    "model": "an object",
    "dataclass": "an object",
}


def explain(error: Mapping[str, Any]) -> tuple[str, str | None]:
    """The line, and the field that it is about; None: the body as a whole.

    Args:
        error: one of pydantic's, as `RequestValidationError.errors()` lists them.
    """
    kind, path = error["type"], [str(part) for part in error["loc"] if part not in ("body", "query", "path")]
    if kind == "json_invalid":  # the place is a number of bytes
        return f"the body is not JSON: {error.get('ctx', {}).get('error', 'it cannot be read')}", None
    name, field = ".".join(path) or "the body", path[0] if path else None
    if kind == "missing":
        return (f"{name} is missing" if path else "the body is missing; send a JSON object"), field
    if not path and isinstance(error.get("input"), bytes):  # it was not taken for JSON
        return "the body is not read as JSON; say Content-Type: application/json", None
    expected = next((text for start, text in EXPECTED.items() if kind.startswith(start)), None)
    reason = (
        f"it should be {expected.format_map(error.get('ctx', {}))}"
        if expected
        else error["msg"][:1].lower() + error["msg"][1:]
    )
    given = _given(error.get("input"))
    return f"{name} is {given}; {reason}" if given else f"{name}: {reason}", field


def check_depth(body: Any) -> Any:
    """The body, unless it is nested more deeply than any answer could repeat it."""
    layer, depth = [body] if isinstance(body, dict | list) else [], 0
    while layer:
        layer = [v for one in layer for v in (one.values() if isinstance(one, dict) else one)]
        layer = [value for value in layer if isinstance(value, dict | list)]
        depth += 1
        if depth > MAX_DEPTH:
            raise PydanticCustomError("too_deep", TOO_DEEP)  # type: ignore[arg-type]
    return body


def unreadable(cause: BaseException | None) -> str | None:
    """Why a body is no JSON, where the decoder failed in another way than by its grammar; None: it did not."""
    if isinstance(cause, RecursionError):
        return f"the body: {TOO_DEEP}"
    if isinstance(cause, UnicodeDecodeError):
        return f"the body is not UTF-8: byte {cause.start} cannot be read"
    return None


def _given(value: Any) -> str:
    """The value as JSON has it, a text in quotes; nothing of what is long to read."""
    if isinstance(value, dict | list | tuple):
        return ""
    if isinstance(value, str):
        return f"{value[:60]!r}"
    try:
        return json.dumps(value)[:60]
    except (TypeError, ValueError):
        return ""
