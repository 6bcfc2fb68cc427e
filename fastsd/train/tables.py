"""A TOML file as frozen dataclasses, checked key by key; `--set key=value` changes single values."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Sequence
from dataclasses import MISSING, Field, asdict, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from fastsd.errors import FastsdError, nearest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")
Table = dict[str, Any]
_NAMES = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}


def read_toml(path: Path) -> Table:
    """A TOML file's values.

    Raises:
        FastsdError: no such file, or not TOML.
    """
    if not path.is_file():
        raise FastsdError("no such file; configs/digits.toml trains the bundled model", argument="--config", path=path)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FastsdError(f"not TOML: {error}", path=path) from None


def override(table: Table, changes: Sequence[str]) -> None:
    """Change `table` in place by texts "a.b.c=value". A value that is no TOML is taken as a string.

    Raises:
        FastsdError: no "=", or a key inside of what is no table.
    """
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals or not key.strip():
            raise FastsdError("it should be key=value, such as unet.fit.steps=500", argument="--set", value=change)
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text.strip()
        *outer, last = key.strip().split(".")
        inner = table
        for name in outer:
            inner = inner.setdefault(name, {})
            if not isinstance(inner, dict):
                raise FastsdError(f"{name} is a value, not a table", argument="--set", value=change)
        inner[last] = value


def build(kind: type[T], table: Table, file: str, prefix: str = "") -> T:
    """A dataclass from `table`. Every key must be a field; a field without a default is required.

    Args:
        file: for errors. prefix: of the keys in errors, such as "unet.".

    Raises:
        FastsdError: an unknown key (the nearest is named), a missing key, a value of the wrong type.
    """
    known: dict[str, Field[Any]] = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    hints = get_type_hints(kind)
    for key in table:
        if key not in known:
            raise unknown(prefix + key, [prefix + name for name in known], file)
    values = {}
    for name, field in known.items():
        if name in table:
            values[name] = _value(hints[name], table[name], file, prefix + name)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise FastsdError(f"the key {prefix}{name} is missing", path=file)
    return kind(**values)


def unknown(key: str, known: Collection[str], file: str) -> FastsdError:
    """The error for a key that is none of `known`."""
    near = nearest(key, known)
    return FastsdError(f"unknown key {key}{near or '; known keys: ' + ', '.join(known)}", path=file)


def check_choice(key: str, value: str, choices: Collection[str], file: object) -> None:
    """Raises FastsdError where `value` is none of `choices`."""
    if value not in choices:
        raise FastsdError(f"{key} is {value!r}; it should be one of {', '.join(choices)}", path=file)


def _value(kind: Any, value: Any, file: str, key: str) -> Any:
    if is_dataclass(kind):
        if not isinstance(value, dict):
            raise FastsdError(f"{key} should be a table, [{key}]", path=file)
        return build(kind, value, file, key + ".")  # type: ignore[arg-type]
    if get_origin(kind) is tuple:
        inner = get_args(kind)
        if not isinstance(value, list) or (inner[-1] is not Ellipsis and len(value) != len(inner)):
            count = "" if inner[-1] is Ellipsis else f"{len(inner)} "
            raise FastsdError(f"{key} is {value!r}; it should be a list of {count}values", path=file)
        return tuple(_value(inner[0], item, file, key) for item in value)
    if isinstance(kind, UnionType):  # X | None, where a file cannot say None
        kind = get_args(kind)[0]
        return _value(kind, value, file, key)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise FastsdError(f"{key} is {value!r}; it should be {_NAMES.get(kind, kind)}", path=file)
    return value


def flatten(settings: Any) -> Table:
    """A dataclass of dataclasses as {"a.b.c": value}."""
    flat: Table = {}

    def visit(value: Any, prefix: str) -> None:
        if isinstance(value, dict) and value:
            for name, inner in value.items():
                visit(inner, f"{prefix}.{name}" if prefix else name)
        else:
            flat[prefix] = list(value) if isinstance(value, tuple) else value

    visit(asdict(settings), "")
    return flat


def write_toml(flat: Table) -> str:
    """TOML of what `flatten` gives, one table after another; values that are None are left out."""
    tables: dict[str, list[str]] = {}
    for key, value in flat.items():
        if value is not None and value != {}:
            table, _, name = key.rpartition(".")
            tables.setdefault(table, []).append(f"{name} = {_literal(value)}")
    top = tables.pop("", [])
    return "\n".join([*top, *(f"\n[{name}]\n" + "\n".join(lines) for name, lines in tables.items())]) + "\n"


def _literal(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_literal(item) for item in value) + "]"
    if isinstance(value, float) and value in (float("inf"), -float("inf")):
        return "inf" if value > 0 else "-inf"
    return json.dumps(value, ensure_ascii=False)  # strings, numbers and booleans are the same in TOML
