"""The manifest of a batch job: what was asked for and what was written, a line of JSON each, appended and never edited.

A line of it counts once it is whole and on the disk, and is written after the images that it names. So a job that was
killed at any moment, or lost its power, goes on from its manifest: what has a line is done, what has none is not.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastsd.batch.store import FolderStore, Store
from fastsd.errors import FastsdError
from fastsd.files import reason, remove_leftovers, write_whole

NAME, LOCK = "manifest.jsonl", ".fastsd-batch.lock"
OWNER = "job.json"  # in a store: whose images it holds
FORM = 1  # of the manifest
DONE, FAILED = "done", "failed"


@dataclass
class Manifest:
    """The manifest of one job, open for its one run.

    Attributes:
        head: what tells the job from others; see `fastsd.batch.job.identity`.
        done: the lines whose images are there.
        failed: of each line that failed last time, why.
        missing: how many lines were done and lack an image now; they are done again.
    """

    folder: Path
    head: dict[str, Any]
    done: set[int] = field(default_factory=set)
    failed: dict[int, str] = field(default_factory=dict)
    missing: int = 0

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / NAME

    @property
    def is_new(self) -> bool:
        """No run of this job has begun."""
        return not self.path.exists()

    def begin(self, model: dict[str, Any] | None) -> None:
        """Write the first line, or check that the job's model is the one of its first run.

        Args:
            model: what files say of the loaded model; None: nobody has loaded it yet, and a later call will say.

        Raises:
            FastsdError: it was another.
        """
        kept = None if model is None else {name: value for name, value in model.items() if value is not None}
        if self.is_new or self.head.get("model") is None:
            self.head["model"] = kept
            write_whole(self.path, _line(self.head), overwrite=not self.is_new)
        elif kept is not None:
            check_model(self.head["model"], kept, self.path)

    @contextlib.contextmanager
    def claimed(self, store: Store) -> Iterator[None]:
        """Have a store say that its images are this job's.

        A run writes that first, so a store that cannot be written to is known before a model is loaded. A job that
        fails before its first image has not begun, and may begin with another model or store.

        Raises:
            FastsdError: it cannot be written to.
        """
        if self.is_new:
            self.begin(None)
        try:
            store.write(OWNER, _owner(self.head))
            yield
        except FastsdError:
            if self.head.get("model") is None and not self.failed:
                with contextlib.suppress(FastsdError):
                    self._forget(store)
            raise

    def _forget(self, store: Store) -> None:
        """Have nothing of the job, where the store holds no image."""
        there = set(store.names())
        if there <= {OWNER}:
            if there:
                store.remove(OWNER)
            self.path.unlink()

    def add(self, records: list[dict[str, Any]]) -> None:
        """Append lines; they are on the disk when this returns."""
        with self.path.open("ab") as file:
            file.write(b"".join(map(_line, records)))
            file.flush()
            os.fsync(file.fileno())
        for record in records:
            if record["state"] == DONE:
                self.done.add(record["line"])
                self.failed.pop(record["line"], None)
            else:
                self.failed[record["line"]] = record["error"]


def check_model(before: dict[str, Any], now: dict[str, Any], path: object) -> None:
    """Refuse a model that is not the one of the job's first run.

    Args:
        before, now: what files say of the two.
        path: of the manifest or its folder, for the error.

    Raises:
        FastsdError: they differ.
    """
    changed = [
        name for name in ("model_fingerprint", "revision", "vae", "refiner") if before.get(name) != now.get(name)
    ]
    if changed:
        raise FastsdError(
            f"the job began with another model ({', '.join(changed)}); give that, or another folder",
            argument="--out",
            path=path,
        )


@contextlib.contextmanager
def open_manifest(folder: Path, head: dict[str, Any], store: Store | None = None) -> Iterator[Manifest]:
    """The manifest in a folder, which nobody else has open: a new one, or that of an earlier run of the same job.

    Args:
        store: of the images; None: the folder.

    Raises:
        FastsdError: another job's, a damaged one, a folder or store with other files, another run under way.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            images = store or FolderStore(folder)
            remove_leftovers(folder)
            images.remove_leftovers()
            found = Manifest(folder, dict(head))
            if found.is_new:
                _check_empty(folder, store)
                if found.head["seed"] is None:
                    found.head["seed"] = secrets.randbelow(2**63)
            else:
                _read(found, head, images)
                if store is not None:
                    _check_owner(store, found.head)
            yield found
    except OSError as error:
        raise FastsdError(f"cannot write there: {reason(error)}", argument="--out", path=folder) from error


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Nobody else's run while this one lasts. The lock dies with its process, however that ends."""
    with (folder / LOCK).open("ab") as file:
        try:
            if os.name == "nt":
                import msvcrt

                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
            else:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise FastsdError("another run of this job is under way", argument="--out", path=folder) from None
        yield


def _check_empty(folder: Path, store: Store | None) -> None:
    others = sorted(entry.name for entry in os.scandir(folder) if entry.name != LOCK)
    if others:
        raise FastsdError(
            f"the folder holds other files ({others[0][:60]!r}); name a new one", argument="--out", path=folder
        )
    if store is not None and store.names():
        raise FastsdError("it holds other files; name a new place", argument="--store", path=str(store))


def _owner(head: dict[str, Any]) -> bytes:
    """What a store says of the job whose images it holds: the same for every run of the job."""
    told = json.dumps([head.get(name) for name in ("sha256", "seed", "settings")], sort_keys=True, default=str)
    return _line(
        {"fastsd_batch": FORM, "prompts": head.get("prompts"), "job": hashlib.sha256(told.encode()).hexdigest()}
    )


def _check_owner(store: Store, head: dict[str, Any]) -> None:
    """Refuse a store that another job took meanwhile: this one had written nothing there."""
    if store.read(OWNER) not in (None, _owner(head)):
        raise FastsdError(
            "it holds the images of another job; name a new place and folder", argument="--store", path=str(store)
        )


def _read(manifest: Manifest, head: dict[str, Any], store: Store) -> None:
    """What earlier runs wrote. A last line that is not whole is cut off: its writer was killed."""
    path = manifest.path
    files: dict[int, list[str]] = {}
    whole = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.endswith(b"\n"):
                break
            record = _parse(raw, number, path)
            whole += len(raw)
            if number == 1:
                _check_head(record, head, path)
                manifest.head = record
                continue
            if record["state"] == DONE:
                manifest.done.add(record["line"])
                manifest.failed.pop(record["line"], None)
                files[record["line"]] = [one["path"] for one in record["files"]]
            else:
                manifest.failed[record["line"]] = record["error"]
    if not whole:
        raise FastsdError("it has no first line; remove it to begin anew", argument="--out", path=path)
    if whole < path.stat().st_size:
        os.truncate(path, whole)
    lacking = store.lacks(name for names in files.values() for name in names)
    lost = {line for line, names in files.items() if not lacking.isdisjoint(names)}
    manifest.done -= lost
    manifest.missing = len(lost)


def _parse(raw: bytes, number: int, path: Path) -> dict[str, Any]:
    try:
        record = json.loads(raw)
        if number == 1:
            fits = isinstance(record["fastsd_batch"], int)
        else:
            of_done = record["state"] == DONE and all(isinstance(one["path"], str) for one in record["files"])
            of_failed = record["state"] == FAILED and isinstance(record["error"], str)
            fits = isinstance(record["line"], int) and (of_done or of_failed)
    except (ValueError, TypeError, KeyError, RecursionError):
        fits = False
    if not fits:
        raise FastsdError(f"its line {number} is damaged or no manifest's", argument="--out", path=path)
    return record


def _check_head(record: dict[str, Any], head: dict[str, Any], path: Path) -> None:
    """Refuse the manifest of another job; the message says where it differs."""
    if record["fastsd_batch"] != FORM:
        raise FastsdError(f"a manifest of another form, {record['fastsd_batch']}", argument="--out", path=path)
    if record.get("sha256") != head["sha256"]:
        name = str(record.get("prompts"))[:80]
        raise FastsdError(
            f"the manifest of another job, whose prompts ({name!r}) are other lines; name another folder",
            argument="--out",
            path=path,
        )
    before, now = record.get("settings") or {}, head["settings"]
    changed = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    if head["seed"] is not None and record.get("seed") != head["seed"]:
        changed.append("seed")
    if changed:
        raise FastsdError(
            f"the manifest of another job: it began with another {{{changed[0]}}}; name another folder, or go on as it "
            "began",
            argument="--out",
            path=path,
        )


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record, default=str).encode() + b"\n"
