"""The work of a batch job: lines to requests, requests of one shape to batches, images to files, then the manifest.

Each batch ends with its images on the disk and their lines in the manifest, in that order. A kill costs the batch that
was under way; its images, where some were written, are written over by the same ones.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsd import __version__
from fastsd.batch.lines import ID, AskedLine, BadLine, read_lines
from fastsd.batch.manifest import DONE, FAILED, FORM, Manifest
from fastsd.batch.requests import CONTROL_PARTS, IMAGES, BatchRequest, in_batches, make_request
from fastsd.cli import controls, embeddings, loras
from fastsd.cli.generate import READERS, load
from fastsd.cli.parser import one_line
from fastsd.cli.repeat import GivenImage
from fastsd.errors import FastsdError, about
from fastsd.files import fingerprint, reason, write_whole
from fastsd.generate.together import join, split
from fastsd.image.files import encode, find_edges, open_image
from fastsd.image.metadata import write_texts
from fastsd.parameters import PARAMETERS
from fastsd.parameters.rows import DEFAULT_BATCH

if TYPE_CHECKING:
    from fastsd.pipeline import Pipeline

# Flags that change no image: where and how fast, not what.
NOT_IDENTITY = ("device", "graphs", "reproducible", "probe", "allow_pickle")
LINES_IN_FOLDER = 1000
PART = 2**20  # bytes read at a time


def identity(args: argparse.Namespace, path: Path) -> dict[str, Any]:
    """What tells a job from others: its lines, and the flags that change images. The manifest's first line.

    Raises:
        FastsdError: the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while part := file.read(PART):
                digest.update(part)
    except OSError as error:
        raise FastsdError(reason(error), argument="prompts", path=path) from error
    names = [row.name for row in PARAMETERS.values() if row.of == "load" and row.name not in NOT_IDENTITY]
    names += ["embedding", "embedding_dir", "lora", "lora_dir", "allow_partial", "format"]
    settings = {name: getattr(args, name) for name in names if getattr(args, name) not in (None, False)}
    return {
        "fastsd_batch": FORM,
        "version": __version__,
        "prompts": path.name,
        "sha256": digest.hexdigest(),
        "seed": args.seed,
        "settings": settings,
    }


def requests(path: Path, job_seed: int) -> Iterator[BatchRequest | BadLine]:
    """The requests of a file, and its bad lines among them.

    Raises:
        FastsdError: the file as a whole cannot be read.
    """
    folder = path.absolute().parent
    for asked in read_lines(path):
        if isinstance(asked, AskedLine):
            try:
                yield make_request(asked, folder, job_seed)
            except FastsdError as error:
                yield BadLine(asked.number, error, asked.fields)
        else:
            yield asked


class BatchWork:
    """One run of a job.

    Args:
        args: the job's flags.
        path: of its lines.
        manifest: of this run or earlier ones.
    """

    def __init__(self, args: argparse.Namespace, path: Path, manifest: Manifest):
        self.args, self.path, self.manifest = args, path, manifest
        self.size = args.batch_size or DEFAULT_BATCH
        self._facts: dict[str, Any] = {}  # what files say of the model
        self._adapters: tuple[Any, list[dict[str, Any]]] = (None, [])  # tags, and what files say of them
        self._nets: dict[str, Any] = {}  # ControlNets, by their paths
        self._shown: set[str] = set()

    def run(self) -> None:
        """Do the lines that are not done.

        Raises:
            FastsdError: the model, a flag or the folder is wrong; with --strict, a line.
        """
        if self.manifest.missing:
            self._say(f"note: the images of {self.manifest.missing} lines that were done are gone; they are made again")
        seed = self.manifest.head["seed"]
        left = (line for line in requests(self.path, seed) if self._number(line) not in self.manifest.done)
        first = next(left, None)
        if first is None:
            return
        notes: list[str] = []
        self.pipe, self._facts = self._load(notes)
        self.manifest.begin(self._facts)
        self._note(notes)
        wanted = sys.stderr.isatty() if self.args.progress is None else self.args.progress
        from tqdm import tqdm

        columns, lines = shutil.get_terminal_size()
        bar = tqdm(file=sys.stderr, disable=not wanted, ncols=min(columns, 100), nrows=lines, unit="line")
        with bar:
            bar.total = _count_lines(self.path)
            bar.update(len(self.manifest.done))
            for batch in in_batches(chain([first], left), self.size):
                if isinstance(batch, BadLine):
                    self._fail(batch)
                    bar.update()
                else:
                    self._do(batch)
                    bar.update(len(batch))

    @staticmethod
    def _number(line: BatchRequest | BadLine) -> int:
        return line.number if isinstance(line, BadLine) else line.line

    def _load(self, notes: list[str]) -> tuple[Pipeline, dict[str, Any]]:
        pipe, facts = load(self.args, {}, notes)
        return pipe, facts | {"version": __version__}

    def _do(self, batch: list[BatchRequest]) -> None:
        """Generate and save. Where a batch fails, each of its lines runs alone, so that one costs no other."""
        started = time.perf_counter()
        try:
            outcomes, notes = self._generate(batch)
        except FastsdError as error:
            if len(batch) > 1:
                for request in batch:
                    self._do([request])
            else:
                self._fail(BadLine(batch[0].line, error, batch[0].fields))
            return
        self._save(batch, outcomes, notes, (time.perf_counter() - started) / len(batch))

    def _generate(self, batch: list[BatchRequest]) -> tuple[list[tuple[list[Any], list[dict[str, Any]]]], list[str]]:
        """The images of each request with their settings, and notes."""
        notes: list[str] = []
        facts = [self._load_named(request, notes) for request in batch]
        calls = [dict(request.arguments) for request in batch]
        for call, own, request in zip(calls, facts, batch, strict=True):
            self._open_images(call, own)
            if request.controls:
                call["controls"], own["controls"] = self._open_controls(request)
        result = self.pipe(**join(calls, self.size))
        return list(split(calls, facts, result)), [*notes, *result.notes]

    def _load_named(self, request: BatchRequest, notes: list[str]) -> dict[str, Any]:
        """Load the LoRAs and embeddings of a request; what its files say."""
        texts = {name: request.arguments.get(name) or "" for name in ("prompt", "negative_prompt")}
        given = vars(self.args) | texts | {"prompt_syntax": request.arguments.get("prompt_syntax"), "from_image": None}
        args = argparse.Namespace(**given)
        found = embeddings.load(self.pipe, args, {}, notes)
        if self._adapters[0] != request.loras:
            self._adapters = (None, [])  # where loading fails, nothing is known of the weights
            self._adapters = (request.loras, loras.load(self.pipe, args, {}, notes))
        return self._facts | {"embeddings": found or None, "loras": self._adapters[1] or None}

    def _open_images(self, call: dict[str, Any], own: dict[str, Any]) -> None:
        for name in IMAGES:
            if name in call:
                given = GivenImage.read(call[name], name)
                with about(name, given.path):
                    call[name] = READERS[name](given.data, name)
                own[PARAMETERS[name].key] = given.as_setting()

    def _open_controls(self, request: BatchRequest) -> tuple[list[Any], list[dict[str, Any]]]:
        chosen = []
        for k, one in enumerate(request.controls):
            kind = "image" if "image" in one else "canny"
            argument = f"controls[{k}].image"
            given = GivenImage.read(one[kind], argument)
            with about(argument, given.path):
                image = open_image(given.data, argument)
                image = find_edges(image) if kind == "canny" else image
            parts = {part: one[part] for part in CONTROL_PARTS if part in one}
            chosen.append(controls.ChosenControl(one["net"], image, given, kind == "canny", parts))
        return controls.load(self.pipe, chosen, bool(self.args.allow_pickle), self._nets)

    def _save(
        self,
        batch: list[BatchRequest],
        outcomes: list[tuple[list[Any], list[dict[str, Any]]]],
        notes: list[str],
        seconds: float,
    ) -> None:
        """Write the images, then their lines in the manifest.

        Raises:
            FastsdError: they cannot be written; that is no fault of a line, and ends the run.
        """
        records = []
        try:
            for request, (images, settings) in zip(batch, outcomes, strict=True):
                files = [
                    self._write(self._name(request, k), image, own)
                    for k, (image, own) in enumerate(zip(images, settings, strict=True))
                ]
                own_id = {ID: request.fields[ID]} if ID in request.fields else {}
                record = {"line": request.line, **own_id, "state": DONE, "request": request.fields}
                record |= {"seed": request.arguments["seed"], "files": files, "notes": notes}
                records.append(record | {"device": self.pipe.device.type, "seconds": round(seconds, 3)})
            self.manifest.add(records)
        except OSError as error:
            raise FastsdError(f"cannot write: {reason(error)}", argument="--out", path=self.args.out) from error
        self._note(notes)

    def _name(self, request: BatchRequest, k: int) -> str:
        """00012/00012345.png, a folder for every thousand lines; with several images 00012345-0.png and so on."""
        several = f"-{k}" if request.count > 1 else ""
        return f"{request.line // LINES_IN_FOLDER:05d}/{request.line:08d}{several}.{self.args.format}"

    def _write(self, name: str, image: Any, settings: dict[str, Any]) -> dict[str, Any]:
        path = self.manifest.folder / name
        path.parent.mkdir(exist_ok=True)
        data = encode(image, path.suffix, write_texts(settings))
        write_whole(path, data, overwrite=True)
        return {"path": name, "sha256": fingerprint(data), "seed": settings["seed"]}

    def _fail(self, line: BadLine) -> None:
        """Say which line is wrong and why, once a run, and keep it in the manifest where that is new."""
        if self.args.strict:
            raise FastsdError(f"line {line.number}: {line.said}", argument="prompts", path=self.path)
        self._say(f"fastsd: error: {self.path} line {line.number}: {line.said}")
        if self.manifest.failed.get(line.number) != line.said:
            record = {"line": line.number, "state": FAILED, "error": line.said, "request": line.fields}
            self.manifest.add([record])

    def _note(self, notes: list[str]) -> None:
        for note in notes:
            if note not in self._shown:
                self._shown.add(note)
                self._say(f"note: {note}")

    def _say(self, text: str) -> None:
        from tqdm import tqdm

        tqdm.write(one_line(text), file=sys.stderr)


def _count_lines(path: Path) -> int | None:
    """For the progress bar; None where it would cost more than reading the file."""
    if path.suffix.lower() in (".csv", ".parquet"):
        return None
    with path.open("rb") as file:
        return sum(part.count(b"\n") for part in iter(lambda: file.read(PART), b""))
