"""Launches that `python -m fastsd tune` measured on this machine. They take precedence over the committed tables.

Each GPU has a file in the user's cache folder. A file is valid for one version of Triton, one of fastsd and one source
of the kernels. A stale or damaged file is ignored with one warning.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from fastsd.files import cache_folder, write_whole
from fastsd.kernels.launch import architecture as architectures

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Lookup:
    """A launcher's lookup in the launch tables: the op, the architecture class, and the sizes that decide."""

    op: str
    architecture: int
    key: tuple[int, ...]


Launches = dict[Lookup, Any]

_launch_types: dict[str, dict[str, type]] = {}  # by op, then by the name of the class
_overrides: Launches = {}
_recorders: list[Callable[[Lookup, Any], None]] = []


def tunable(op: str, *launch_types: type) -> Callable[[F], F]:
    """Decorator for `choose(architecture, *key)`, which reads the committed table of `op`.

    Overrides and tuned launches take precedence. `__wrapped__` is the undecorated function.
    """

    def decorate(choose: F) -> F:
        _launch_types[op] = {launch_type.__name__: launch_type for launch_type in launch_types}

        @functools.wraps(choose)
        def tuned_or_committed(architecture: int, *key: int) -> Any:
            lookup = Lookup(op, architecture, key)
            for record in _recorders:
                record(lookup, choose(architecture, *key))
            launch = _overrides.get(lookup) or _active_table(architecture).get(lookup)
            return launch or choose(architecture, *key)

        return tuned_or_committed  # type: ignore[return-value]

    return decorate


@contextmanager
def recorded_lookups() -> Iterator[Launches]:
    """Inside this context every lookup is recorded, with its committed launch."""
    lookups: Launches = {}
    _recorders.append(lookups.__setitem__)
    try:
        yield lookups
    finally:
        _recorders.remove(lookups.__setitem__)


@contextmanager
def overridden(lookup: Lookup, launch: Any) -> Iterator[None]:
    """Inside this context `lookup` returns `launch`."""
    previous = dict(_overrides)
    _overrides[lookup] = launch
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(previous)


def fingerprint(gpu: str, architecture: int) -> dict[str, Any]:
    """What a table is valid for: a GPU, its architecture class, versions, and the source of the kernels."""
    return {
        "gpu": gpu,
        "architecture": architecture,
        "triton": importlib.metadata.version("triton"),
        "fastsd": sys.modules["fastsd"].__version__,  # imported before any of its modules
        "kernels": _source_digest(),
    }


@functools.cache
def _source_digest() -> str:
    files = sorted(Path(__file__).parent.parent.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def table_path(valid_for: Mapping[str, Any]) -> Path:
    """The file of a GPU's table."""
    name = re.sub(r"[^a-z0-9]+", "-", valid_for["gpu"].lower()).strip("-")
    return cache_folder() / f"launches-{name}-sm{valid_for['architecture']}.json"


def save(launches: Launches, valid_for: Mapping[str, Any]) -> Path:
    """Write a table whole or not at all.

    Raises:
        OSError: the folder cannot be written to.
    """
    entries = [
        {"op": lookup.op, "key": list(lookup.key), "kind": type(launch).__name__, "launch": asdict(launch)}
        for lookup, launch in launches.items()
    ]
    text = json.dumps({**valid_for, "check": _checksum(entries), "launches": entries}, indent=1)
    file = table_path(valid_for)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, f"{text}\n".encode(), overwrite=True)
    _active_table.cache_clear()
    return file


def load(valid_for: Mapping[str, Any]) -> Launches:
    """The table of a GPU. Empty if there is none, and, with a warning, if it is stale or damaged."""
    file = table_path(valid_for)
    try:
        text = file.read_text()
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        return _ignored(file, f"cannot be read ({error})")
    try:
        table = json.loads(text)
        for name, value in valid_for.items():
            if table[name] != value:
                return _ignored(file, f"is stale: {name} was {table[name]}, is {value}")
        if table["check"] != _checksum(table["launches"]):
            return _ignored(file, "is damaged: its checksum does not match its contents")
        return {
            Lookup(entry["op"], valid_for["architecture"], tuple(entry["key"])): _launch(entry)
            for entry in table["launches"]
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return _ignored(file, f"is damaged: {type(error).__name__} {error}")


def _launch(entry: Mapping[str, Any]) -> Any:
    fields = {name: tuple(x) if isinstance(x, list) else x for name, x in entry["launch"].items()}
    return _launch_types[entry["op"]][entry["kind"]](**fields)


def _checksum(entries: list[dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def _ignored(file: Path, reason: str) -> Launches:
    warnings.warn(
        f"{file} {reason}; the committed launches are used (python -m fastsd tune measures again)", stacklevel=2
    )
    return {}


@functools.cache
def _active_table(architecture: int) -> Launches:
    """The table of this machine's first GPU of that class."""
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            if architectures.class_of(torch.device("cuda", i)) == architecture:
                return load(fingerprint(torch.cuda.get_device_name(i), architecture))
    return {}


def describe(device: torch.device) -> str:
    """The launch tables that `device` uses, as text."""
    if device.type != "cuda":
        return "the committed tables, as for sm_90"
    architecture = architectures.class_of(device)
    table = _active_table(architecture)
    committed = f"the committed tables of sm_{architecture}"
    if not table:
        return committed
    file = table_path(fingerprint(torch.cuda.get_device_name(device), architecture))
    return f"{len(table)} tuned launches in {file}, otherwise {committed}"
