"""The table of a GPU's choices: which way computes which call, as a file that can be read, shared and committed.

A table belongs to one GPU, driver, torch, Triton, fastsd and source of the kernels: other ones have a file of their
own. Tables that come with fastsd, in `fastsd/kernels/tables`, and imported ones hold for their GPU whatever the
versions; each of their choices is compared with the specification at its first use here.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from fastsd.errors import FastsdError
from fastsd.files import cache_folder, reason, write_whole
from fastsd.kernels.choice.op import GpuOp, Way

log = logging.getLogger(__name__)

FORMAT = "fastsd choices 1"
COMMITTED = Path(__file__).parent.parent / "tables"
IDENTITY = ("gpu", "architecture", "driver", "torch", "triton", "fastsd", "kernels")
SPOILT = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
MOST_BYTES = 64 * 2**20  # of a file; a thousand calls with 300 launches each have less than half
NAME = 128  # characters of a GPU's name, at most

Place = tuple[str, str]  # op, key


@dataclass(frozen=True)
class TableEntry:
    """The choice of one call.

    Attributes:
        candidate, launch: the way; a launch is its class's name with its fields, or None.
        microseconds: of each way that was timed.
        checked: its result was compared with the specification on this machine, with these versions.
        excluded: reasons by way: wrong, does not compile, faults.
        doubted: reasons by way that may lie elsewhere: its own process was killed, or did not answer in time. Another
            process tries such a way once more, and then excludes it or not.
    """

    candidate: str | None = None
    launch: dict[str, Any] | None = None
    microseconds: dict[str, float] = field(default_factory=dict)
    checked: bool = False
    excluded: dict[str, str] = field(default_factory=dict)
    doubted: dict[str, str] = field(default_factory=dict)

    def way(self, op: GpuOp) -> Way | None:
        """The way of this choice; None if there is no choice, or none that this fastsd knows."""
        candidate = op.candidate(self.candidate or "")
        if candidate is None or self.launch is None:
            return None if candidate is None else Way(candidate)
        fields = dict(self.launch)
        kinds = {kind.__name__: kind for kind in candidate.launch_types}
        try:
            return Way(candidate, _launch(kinds[fields.pop("kind")], fields))
        except SPOILT:
            return None


def _launch(kind: Any, fields: dict[str, Any]) -> Any:
    """The launch of a class with these fields, some of which may be launches themselves."""
    kinds = get_type_hints(kind)

    def read(name: str, x: Any) -> Any:
        if isinstance(x, dict):
            return _launch(kinds[name], x)
        return tuple(x) if isinstance(x, list) else x

    return kind(**{name: read(name, x) for name, x in fields.items()})


def entry_of(way: Way, microseconds: dict[str, float], excluded: dict[str, str], doubted: dict[str, str]) -> TableEntry:
    """The entry of a way that was compared and timed here."""
    launch = None
    if way.launch is not None:
        launch = {"kind": type(way.launch).__name__, **json.loads(json.dumps(asdict(way.launch)))}  # tuples as lists
    return TableEntry(way.candidate.name, launch, microseconds, True, excluded, doubted)


@dataclass
class ChoiceTable:
    """The choices of one GPU.

    Attributes:
        identity: what they are valid for; the names of `IDENTITY`.
        entries: by op and key.
    """

    identity: dict[str, Any]
    entries: dict[Place, TableEntry] = field(default_factory=dict)

    def text(self) -> str:
        """The file: JSON, with a line for each choice."""
        lines = [
            json.dumps({"op": op, "key": key, **{name: x for name, x in asdict(entry).items() if x not in (None, {})}})
            for (op, key), entry in sorted(self.entries.items())
        ]
        head = json.dumps({"format": FORMAT, **self.identity, "check": _checksum(lines)}, indent=1)
        return f'{head[:-2]},\n "choices": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n"

    @classmethod
    def read(cls, text: str) -> ChoiceTable:
        """The table of a file's text.

        Raises:
            FastsdError: it is none, of another format, damaged or cut off; it says which.
        """
        try:
            stored = json.loads(text)
            if not isinstance(stored, dict) or not str(stored.get("format", "")).startswith("fastsd choices"):
                raise FastsdError("it is no table of choices; python -m fastsd tune --export writes one")
            if stored["format"] != FORMAT:
                raise FastsdError(f"its format is {stored['format']!r}, and this fastsd reads {FORMAT!r}")
            choices = stored["choices"]
            if stored["check"] != _checksum([json.dumps(one) for one in choices]):
                raise FastsdError("it is damaged: its checksum does not match its contents")
            entries = dict(_stored_choice(one) for one in choices)
            identity = {name: stored[name] for name in IDENTITY}
            if not isinstance(identity["gpu"], str) or not 0 < len(identity["gpu"]) <= NAME:
                raise ValueError("the GPU's name names a file")
            return cls(identity, entries)
        except SPOILT as error:
            if isinstance(error, FastsdError):
                raise
            damaged = "cut off or damaged" if text.lstrip().startswith("{") else "no table of choices"
            raise FastsdError(f"it is {damaged}; python -m fastsd tune --export writes one") from error


def _stored_choice(stored: dict[str, Any]) -> tuple[Place, TableEntry]:
    """A choice of a file, whose checksum says nothing of who wrote it.

    Raises:
        ValueError, KeyError, TypeError: it is none.
    """
    op, key = stored.pop("op"), stored.pop("key")
    entry = TableEntry(**stored)
    right = (
        all(isinstance(name, str) for name in (op, key))
        and isinstance(entry.candidate, str | None)
        and isinstance(entry.launch, dict | None)
        and isinstance(entry.checked, bool)
        and all(isinstance(time, int | float) for time in entry.microseconds.values())
        and all(isinstance(reason, str) for reason in (*entry.excluded.values(), *entry.doubted.values()))
    )
    if not right:
        raise ValueError(f"{op!r}, {key!r}: no choice")
    return (op, key), entry


def _checksum(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]


def table_path(identity: Mapping[str, Any]) -> Path:
    """The file of a GPU's table in the user's cache: its name has the GPU's, and digits that stand for the versions."""
    digits = hashlib.sha256(json.dumps([identity[name] for name in IDENTITY]).encode()).hexdigest()[:8]
    return cache_folder() / f"choices-{_slug(identity)}-{digits}.json"


def imported_path(identity: Mapping[str, Any]) -> Path:
    """The file in the user's cache that holds what was imported for a GPU."""
    return cache_folder() / f"imported-{_slug(identity)}.json"


def _slug(identity: Mapping[str, Any]) -> str:
    return re.sub(r"[^a-z0-9]+", "-", str(identity["gpu"]).lower()).strip("-")


def read_file(path: Path) -> ChoiceTable:
    """The table in a file.

    Raises:
        FastsdError: it cannot be read, or `ChoiceTable.read` refuses it.
    """
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise FastsdError("it is no regular file")
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise FastsdError(f"it is no table of choices: those have at most {MOST_BYTES // 2**20} MiB")
        return ChoiceTable.read(data.decode())
    except OSError as error:
        raise FastsdError(reason(error), path=path) from error
    except UnicodeDecodeError as error:
        raise FastsdError("it is no table of choices; python -m fastsd tune --export writes one", path=path) from error
    except FastsdError as error:
        error.path = path
        raise


def load(identity: dict[str, Any]) -> ChoiceTable:
    """The table of this GPU and these versions: empty if there is none, and, with one warning, if it is damaged."""
    path = table_path(identity)
    if not os.path.exists(path):  # nor can it be looked up: `save` says so
        names = f"choices-{_slug(identity)}-????????.json"
        others = sorted(path.parent.glob(names)) if os.path.isdir(path.parent) else []
        if others:
            _tell_other_version(others[-1], identity)
        return ChoiceTable(identity)
    try:
        table = read_file(path)
    except FastsdError as error:
        log.warning("%s; the ops are measured anew, at their first use", error)
        return ChoiceTable(identity)
    return ChoiceTable(identity, table.entries)


def _tell_other_version(other: Path, identity: Mapping[str, Any]) -> None:
    try:
        before = read_file(other).identity
    except FastsdError:
        return
    changed = [f"{name} {before[name]}, now {identity[name]}" for name in IDENTITY if before[name] != identity[name]]
    if changed:
        what = "; ".join(changed)
        log.warning("the ops of %s are measured anew, at their first use: %s", identity["gpu"], what)


def shared(identity: Mapping[str, Any], committed_only: bool = False, proven: bool = False) -> dict[Place, TableEntry]:
    """The choices for this GPU that come with fastsd, and those that were imported, which take precedence.

    None of them counts as checked here. A damaged file is left out with a warning.

    Args:
        committed_only: without the imported ones.
        proven: only those of this torch and Triton, whose kernels run on this GPU.
    """
    same = ("gpu", "torch", "triton") if proven else ("gpu",)
    found: dict[Place, TableEntry] = {}
    imported = [] if committed_only else [imported_path(identity)]
    for path in [*sorted(COMMITTED.glob("*.json")), *imported]:
        if os.path.exists(path):
            try:
                table = read_file(path)
            except FastsdError as error:
                log.warning("%s; it is not used", error)
                continue
            if all(table.identity[name] == identity[name] for name in same):
                found |= {place: _unchecked(entry) for place, entry in table.entries.items()}
    return found


def _unchecked(entry: TableEntry) -> TableEntry:
    """What another machine's entry says here: its choice, without what was excluded there."""
    return TableEntry(entry.candidate, entry.launch, entry.microseconds)


def save(table: ChoiceTable, revised: Collection[Place] = ()) -> Path:
    """Write the table into the user's cache, whole or not at all. What another process chose before is kept.

    Args:
        revised: places whose entries replace those in the file.

    Raises:
        OSError: the folder cannot be written to.
    """
    path = table_path(table.identity)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        try:
            there = read_file(path).entries
        except FastsdError:  # none yet, or a damaged one
            there = {}
        kept = {place: entry for place, entry in there.items() if entry.candidate and place not in revised}
        merged = ChoiceTable(table.identity, {**there, **table.entries, **kept})
        write_whole(path, merged.text().encode(), overwrite=True)
    return path


def export(identity: dict[str, Any], path: Path) -> int:
    """Write all that is known of this GPU to a file to share. Returns the number of choices.

    Raises:
        FastsdError: nothing is known, or the file cannot be written.
    """
    table = ChoiceTable(identity, {**shared(identity), **load(identity).entries})
    if not table.entries:
        raise FastsdError(f"nothing was measured on {identity['gpu']} yet: run python -m fastsd tune first")
    try:
        write_whole(path, table.text().encode(), overwrite=True)
    except OSError as error:
        raise FastsdError(reason(error), path=path) from error
    return len(table.entries)


def import_file(path: Path) -> ChoiceTable:
    """Take over a shared file, for the GPU that it names. What was measured here keeps precedence.

    Raises:
        FastsdError: it is no table, or the cache cannot be written to.
    """
    table = read_file(path)
    target = imported_path(table.identity)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target):
            write_whole(target, table.text().encode(), overwrite=True)
    except OSError as error:
        raise FastsdError(reason(error), path=target) from error
    return table


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time, where the system has such locks; elsewhere the last one to write wins, whole."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    with open(path.with_suffix(".lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass  # some network file systems have none
        yield
