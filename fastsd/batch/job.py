"""What a batch job is: its lines, those that are left, and what tells it from other jobs."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsd import __version__
from fastsd.batch.lines import AskedLine, BadLine, read_lines
from fastsd.batch.manifest import FORM
from fastsd.batch.requests import BatchRequest, make_request
from fastsd.errors import FastsdError
from fastsd.files import reason
from fastsd.parameters import PARAMETERS

# Flags that change no image: where and how fast, not what.
NOT_IDENTITY = ("device", "graphs", "reproducible", "probe", "allow_pickle")
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
    names += ["embedding", "embedding_dir", "lora", "lora_dir", "allow_partial", "format", "store"]
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


@dataclass(frozen=True)
class LinesLeft:
    """The requests and bad lines of a file that are not done; each walk reads the file anew.

    Attributes:
        seed: the job's.
        done: numbers of lines.
    """

    path: Path
    seed: int
    done: frozenset[int]

    def __iter__(self) -> Iterator[BatchRequest | BadLine]:
        for line in requests(self.path, self.seed):
            if number_of(line) not in self.done:
                yield line


def number_of(line: BatchRequest | BadLine) -> int:
    """The number of a line."""
    return line.number if isinstance(line, BadLine) else line.line


def count_lines(path: Path) -> int | None:
    """For the progress bar; None where it would cost more than reading the file."""
    if path.suffix.lower() in (".csv", ".parquet"):
        return None
    with path.open("rb") as file:
        return sum(part.count(b"\n") for part in iter(lambda: file.read(PART), b""))
