"""Launches that `python -m fastsd tune` measured on this machine: they go before the committed tables.

A file for each GPU in the user's cache folder. It belongs to a Triton version, a fastsd version and the kernels' very
source: with any other it is stale, and left aside with one warning, as a damaged one is.
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
class Question:
    """What a launcher asks the tables: the op, the architecture class, and the sizes that decide."""

    op: str
    architecture: int
    key: tuple[int, ...]


Launches = dict[Question, Any]

_kinds: dict[str, dict[str, type]] = {}  # of launches, by op and name
_tried: Launches = {}
_listeners: list[Callable[[Question, Any], None]] = []


def tunable(op: str, *kinds: type) -> Callable[[F], F]:
    """Decorator for the function that reads `op`'s committed table: `choose(architecture, *key)` to one of `kinds`.

    What is being tried, and what was tuned, go first. The committed choice stays at hand as `__wrapped__`.
    """

    def decorate(choose: F) -> F:
        _kinds[op] = {kind.__name__: kind for kind in kinds}

        @functools.wraps(choose)
        def chosen(architecture: int, *key: int) -> Any:
            question = Question(op, architecture, key)
            for tell in _listeners:
                tell(question, choose(architecture, *key))
            launch = _tried.get(question) or _in_use(architecture).get(question)
            return launch or choose(architecture, *key)

        return chosen  # type: ignore[return-value]

    return decorate


@contextmanager
def asked() -> Iterator[dict[Question, Any]]:
    """Inside this context the questions of all launchers are kept, each with its committed answer."""
    found: dict[Question, Any] = {}
    _listeners.append(found.__setitem__)
    try:
        yield found
    finally:
        _listeners.remove(found.__setitem__)


@contextmanager
def tried(question: Question, launch: Any) -> Iterator[None]:
    """Inside this context `launch` is the answer to `question`."""
    before = dict(_tried)
    _tried[question] = launch
    try:
        yield
    finally:
        _tried.clear()
        _tried.update(before)


def origin(gpu: str, architecture: int) -> dict[str, Any]:
    """What a table belongs to."""
    return {
        "gpu": gpu,
        "architecture": architecture,
        "triton": importlib.metadata.version("triton"),
        "fastsd": sys.modules["fastsd"].__version__,  # there already, being what this is a part of
        "kernels": _digest_of_kernels(),
    }


@functools.cache
def _digest_of_kernels() -> str:
    files = sorted(Path(__file__).parent.parent.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def path_of(belongs: Mapping[str, Any]) -> Path:
    """The file of a GPU."""
    name = re.sub(r"[^a-z0-9]+", "-", belongs["gpu"].lower()).strip("-")
    return cache_folder() / f"launches-{name}-sm{belongs['architecture']}.json"


def save(launches: Launches, belongs: Mapping[str, Any]) -> Path:
    """Write a table whole or not at all.

    Raises:
        OSError: the folder cannot be written to.
    """
    entries = [
        {"op": q.op, "key": list(q.key), "kind": type(launch).__name__, "launch": asdict(launch)}
        for q, launch in launches.items()
    ]
    text = json.dumps({**belongs, "check": _check(entries), "launches": entries}, indent=1)
    file = path_of(belongs)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, f"{text}\n".encode(), overwrite=True)
    _in_use.cache_clear()
    return file


def load(belongs: Mapping[str, Any]) -> Launches:
    """The table of a GPU; empty where there is none, and, with a warning, where it is stale or damaged."""
    file = path_of(belongs)
    try:
        text = file.read_text()
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        return _refused(file, f"cannot be read ({error})")
    try:
        found = json.loads(text)
        for name, value in belongs.items():
            if found[name] != value:
                return _refused(file, f"is stale: {name} was {found[name]}, is {value}")
        if found["check"] != _check(found["launches"]):
            return _refused(file, "is damaged: its contents do not give its checksum")
        return {
            Question(entry["op"], belongs["architecture"], tuple(entry["key"])): _launch(entry)
            for entry in found["launches"]
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return _refused(file, f"is damaged: {type(error).__name__} {error}")


def _launch(entry: Mapping[str, Any]) -> Any:
    fields = {name: tuple(x) if isinstance(x, list) else x for name, x in entry["launch"].items()}
    return _kinds[entry["op"]][entry["kind"]](**fields)


def _check(entries: list[dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def _refused(file: Path, reason: str) -> Launches:
    warnings.warn(
        f"{file} {reason}; the committed launches are used (python -m fastsd tune measures anew)", stacklevel=2
    )
    return {}


@functools.cache
def _in_use(architecture: int) -> Launches:
    """The table of the first GPU here of that class; read once."""
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            if architectures.of(torch.device("cuda", i)) == architecture:
                return load(origin(torch.cuda.get_device_name(i), architecture))
    return {}


def described(device: torch.device) -> str:
    """Which launches a device gets, for a reader."""
    if device.type != "cuda":
        return "the committed tables, as for sm_90"
    architecture = architectures.of(device)
    table = _in_use(architecture)
    committed = f"the committed tables of sm_{architecture}"
    if not table:
        return committed
    file = path_of(origin(torch.cuda.get_device_name(device), architecture))
    return f"{len(table)} tuned ones of {file}, else {committed}"
