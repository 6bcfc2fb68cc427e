"""Every parameter, stated once: name, type, range, default, flags, help, what it needs, and its name in A1111's text.

The call's validation, the command line with its help, an image's metadata, A1111's text, `--from-image` and
docs/reference.md derive from `PARAMETERS`. To add a parameter, add a row to `rows.py` or one of its parts; then use it
where it acts, as `request.settings.<name>`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from fastsd.errors import FastsdError, nearest
from fastsd.parameters.kinds import MAX_SEED, Constant, Parameter
from fastsd.parameters.rows import ROWS

PARAMETERS: dict[str, Parameter] = {row.name: row for row in ROWS}


class Settings(dict[str, Any]):
    """A value for each parameter of a call; `settings.seed` is `settings["seed"]`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def replace(self, **changes: Any) -> Settings:
        """The same settings with some of them changed."""
        return Settings(self | changes)


def of_call() -> list[Parameter]:
    """The parameters of `Pipeline.__call__`."""
    return [parameter for parameter in PARAMETERS.values() if parameter.of == "call"]


def describe(of: str) -> str:
    """The arguments of a call ("call") or of loading ("load"), a line each, for docstrings."""
    lines = ["        Arguments:"]
    for row in PARAMETERS.values():
        if row.of != of or row.name == "model":
            continue
        default = "" if row.default in (None, "", ()) else f" (default: {row.default})"
        lines.append(f"            {row.name}: {row.text.replace('{', '`').replace('}', '`')}{default}")
    return "\n".join(lines) + "\n        "


def check_call(arguments: Mapping[str, Any], loaded: Collection[str] = ()) -> Settings:
    """The arguments of a call, each within its range, with the defaults of those that are missing or None.

    Args:
        arguments: by name, as the caller gave them.
        loaded: parameters of the loaded pipeline that arguments may need, such as "refiner".

    Raises:
        FastsdError: an argument that is unknown, out of range, or without effect beside the others.
    """
    known = {parameter.name: parameter for parameter in of_call()}
    for name in arguments:
        if name not in known:
            flags = {flag.lstrip("-").replace("-", "_"): row.name for row in known.values() for flag in row.flags}
            hint = f"; did you mean {flags[name]}?" if name in flags else nearest(name, known)
            raise FastsdError(f"no such argument{hint}", argument=name)
    given = {name: value for name, value in arguments.items() if value is not None}
    check_needs({*(name for name, value in given.items() if asks(known[name], value)), *loaded})
    return Settings(
        {
            name: parameter.check(given[name]) if name in given else parameter.default
            for name, parameter in known.items()
        }
    )


def recorded(settings: Settings) -> dict[str, Any]:
    """The settings of a call that an image's metadata keeps; prompts and seed, which each image has, are not among
    them."""
    given = {name for name, value in settings.items() if value is not None}
    given |= {"refiner"} if settings.refiner_switch is not None else set()
    given = _counted(given - {row.name for row in of_call() if settings[row.name] is False})
    return {
        parameter.name: parameter.kind.recorded(settings[parameter.name])
        for parameter in of_call()
        if parameter.is_repeated
        and parameter.name not in ("prompt", "negative_prompt", "seed")
        and (parameter.needs is None or parameter.needs[0] in given)
        and not (isinstance(parameter.kind, Constant) and settings[parameter.name] == parameter.default)
    }


def not_stored(names: Iterable[str]) -> list[str]:
    """A note on each of the arguments that change the image and that its metadata does not hold."""
    return [f"{name} is not stored: the image does not repeat from its settings alone" for name in names]


def asks(parameter: Parameter, value: object) -> bool:
    """Whether a value asks for something: None does not, nor do False and 0 where they are the default."""
    return value is not None and not (
        parameter.default in (False, 0) and type(value) in (bool, int, float) and not value
    )


def check_needs(given: Collection[str]) -> None:
    """Refuse parameters that have no effect, or no meaning, beside the others.

    Args:
        given: the names of all that were given.

    Raises:
        FastsdError: it names both.
    """
    given = _counted(given)
    for parameter in PARAMETERS.values():
        if parameter.name not in given:
            continue
        if parameter.needs is not None and parameter.needs[0] not in given:
            raise FastsdError(f"given without {{{parameter.needs[0]}}}, {parameter.needs[1]}", argument=parameter.name)
        if parameter.excludes is not None and parameter.excludes[0] in given:
            raise FastsdError(
                f"given with {{{parameter.excludes[0]}}}; {parameter.excludes[1]}", argument=parameter.name
            )


def check_seeds(seed: int, count: int) -> None:
    """Refuse a seed that leaves none for each of `count` images, which have one more from one to the next.

    Raises:
        FastsdError: it says so.
    """
    if seed > MAX_SEED - count + 1:
        raise FastsdError(f"it leaves no seeds for {count} images up to {MAX_SEED}", argument="seed", value=seed)


def _counted(given: Collection[str]) -> set[str]:
    """The names that were given, with those that others of them count as."""
    return {*given, *(row.counts_as for row in PARAMETERS.values() if row.counts_as and row.name in given)}
