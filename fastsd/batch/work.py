"""The run of a batch job: outcomes to images on the disk, then to lines of the manifest, in that order.

A kill costs the batches that were under way; their images, where some were written, are written over by the same ones.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from fastsd.batch.engine import BatchOutcome
from fastsd.batch.job import LinesLeft, count_lines
from fastsd.batch.manifest import DONE, Manifest
from fastsd.batch.store import Store
from fastsd.cli.parser import one_line
from fastsd.errors import FastsdError
from fastsd.files import reason

OutcomesOf = Callable[[LinesLeft, dict[str, Any] | None], Generator[BatchOutcome]]


class BatchWork:
    """One run of a job.

    Args:
        args: the job's flags.
        path: of its lines.
        manifest: of this run or earlier ones.
        store: of its images.
    """

    def __init__(self, args: argparse.Namespace, path: Path, manifest: Manifest, store: Store):
        self.args, self.path, self.manifest, self.store = args, path, manifest, store
        self._shown: set[str] = set()

    def run(self, outcomes_of: OutcomesOf) -> None:
        """Do the lines that are not done.

        Args:
            outcomes_of: the outcomes of lines, each once; the second argument is what the manifest says of the model.

        Raises:
            FastsdError: the model, a flag or a folder is wrong; with --strict, a line.
        """
        if self.manifest.missing:
            self._say(f"note: the images of {self.manifest.missing} lines that were done are gone; they are made again")
        left = LinesLeft(self.path.absolute(), self.manifest.head["seed"], frozenset(self.manifest.done))
        if next(iter(left), None) is None:
            return
        claimed = self.manifest.claimed(self.store) if self.args.store else contextlib.nullcontext()
        outcomes = outcomes_of(left, self.manifest.head.get("model"))
        wanted = sys.stderr.isatty() if self.args.progress is None else self.args.progress
        from tqdm import tqdm

        columns, lines = shutil.get_terminal_size()
        bar = tqdm(file=sys.stderr, disable=not wanted, ncols=min(columns, 100), nrows=lines, unit="line")
        with claimed, bar, contextlib.closing(outcomes):
            bar.total = count_lines(self.path)
            bar.update(len(self.manifest.done))
            for outcome in outcomes:
                self._keep(outcome)
                bar.update(len(outcome.records))

    def _keep(self, outcome: BatchOutcome) -> None:
        """Write images, then their lines of the manifest.

        Raises:
            FastsdError: they cannot be written; that is no fault of a line, and ends the run.
        """
        if outcome.facts is not None:
            self.manifest.begin(outcome.facts)
        for name, data in outcome.images.items():
            self.store.write(name, data)
        new = [record for record in outcome.records if record["line"] not in self.manifest.done]
        records = [record for record in new if record["state"] == DONE or self._fail(record)]
        try:
            self.manifest.add(records)
        except OSError as error:
            raise FastsdError(f"cannot write: {reason(error)}", argument="--out", path=self.args.out) from error
        for note in outcome.notes:
            if note not in self._shown:
                self._shown.add(note)
                self._say(f"note: {note}")

    def _fail(self, record: dict[str, Any]) -> bool:
        """Say which line is wrong and why; whether the manifest does not say so yet."""
        number, said = record["line"], record["error"]
        if self.args.strict:
            raise FastsdError(f"line {number}: {said}", argument="prompts", path=self.path)
        self._say(f"fastsd: error: {self.path} line {number}: {said}")
        return bool(self.manifest.failed.get(number) != said)

    def _say(self, text: str) -> None:
        from tqdm import tqdm

        tqdm.write(one_line(text), file=sys.stderr)
