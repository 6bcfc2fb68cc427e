"""Batch jobs: `fastsd batch prompts.jsonl --out DIR` generates what each line of a file asks for."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fastsd.cli import flags
from fastsd.errors import FastsdError
from fastsd.parameters import PARAMETERS, of_call
from fastsd.parameters.kinds import MAX_SEED, Parameter, Whole

if TYPE_CHECKING:
    from fastsd.batch.store import Store
    from fastsd.batch.work import OutcomesOf

FORMATS = ("png", "jpg", "webp")
USED = ("embedding", "embedding_dir", "lora", "lora_dir", "allow_partial", "progress")  # of the flags beside parameters
SEED = Parameter(
    "seed", Whole(low=0, high=MAX_SEED), "from which lines without a seed draw theirs (default: random)", ("--seed",)
)
WORKERS = Parameter(
    "workers", Whole(low=1, high=100_000), "processes of --ray (default: one a GPU, else one a machine)", ("--workers",)
)
THREADS = Parameter(
    "threads", Whole(low=1, high=1024), "cores of each (default: 1 beside a GPU, else all)", ("--threads",)
)
OWN = (SEED, WORKERS, THREADS)


def rows() -> list[Parameter]:
    """The parameters of the job: those of loading, and some that the command line alone has."""
    load = [row for row in PARAMETERS.values() if row.of == "load" and row.flags and row.name != "preview"]
    return [*load, PARAMETERS["batch_size"], *(flags.CLI[name] for name in USED)]


def elsewhere() -> dict[str, str]:
    """The flags of a call, and the fields of a line that stand for them."""
    known = {flag for row in (*rows(), *OWN) for flag in row.flags}
    return {
        flag: f"a line of the file has it as {row.name}" for row in of_call() for flag in row.flags if flag not in known
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `fastsd batch`."""
    parser.add_argument("prompts", metavar="FILE", help="a request a line: .jsonl, .csv or .parquet (docs/batch.md)")
    parser.add_argument("--out", required=True, metavar="DIR", help="for the images and manifest.jsonl; a new folder")
    parser.add_argument("--format", choices=FORMATS, default="png", help="of the images (default: %(default)s)")
    parser.add_argument("--store", metavar="URL", help="for the images instead: s3://bucket/folder, file:///folder")
    parser.add_argument(
        "--ray", nargs="?", const="local", metavar="HOST:PORT", help="on a cluster of Ray (default: this machine)"
    )
    for row in OWN:
        parser.add_argument(*row.flags, metavar="N", help=row.help)
    parser.add_argument("--strict", action="store_true", help="check every line first, and stop at the first bad one")
    for row in rows():
        flags.add_flag(parser, row)
    parser.set_defaults(taesd=False, preview=None)


def run(args: argparse.Namespace) -> int:
    """Do the lines that are not done yet.

    Returns:
        0 when every line has its images, 1 when some failed.

    Raises:
        FastsdError: a file or a flag that is wrong, a store or cluster that is not there; with --strict, a bad line.
    """
    from fastsd.batch.job import identity, requests
    from fastsd.batch.lines import BadLine, read_lines
    from fastsd.batch.manifest import open_manifest
    from fastsd.batch.store import FolderStore, open_store
    from fastsd.batch.work import BatchWork

    for row in rows():
        flags.read_value(args, row)
    for own in OWN:
        flags.read_value(args, own)
    path = Path(args.prompts)
    head = identity(args, path)
    if next(read_lines(path), None) is None:
        raise FastsdError("no line in it asks for an image", argument="prompts", path=path)
    if args.strict:
        for line in requests(path, 0):
            if isinstance(line, BadLine):
                raise FastsdError(f"line {line.number}: {line.said}", argument="prompts", path=path)
    store = None if args.store is None else open_store(args.store)
    with _outcomes_of(args, store) as outcomes_of, open_manifest(Path(args.out), head, store) as manifest:
        work = BatchWork(args, path, manifest, store or FolderStore(Path(args.out)))
        work.run(outcomes_of)
    failed = len(manifest.failed)
    print(f"{len(manifest.done)} done, {failed} failed: {manifest.path}")
    sys.stdout.flush()
    return 1 if failed else 0


@contextlib.contextmanager
def _outcomes_of(args: argparse.Namespace, store: Store | None) -> Iterator[OutcomesOf]:
    """What does lines: this process, or the workers of a cluster that stays connected meanwhile."""
    if args.ray is None:
        for row in (WORKERS, THREADS):
            if getattr(args, row.name) is not None:
                raise FastsdError("given without --ray", argument=row.flag, value=getattr(args, row.name))
        from fastsd.batch import engine

        yield partial(engine.outcomes, args, store=store)
    else:
        from fastsd.batch import cluster
        from fastsd.runtime.ray_cluster import connected

        if (args.store or "").startswith("memory:"):
            raise FastsdError(
                "it is the memory of one process, and --ray has several", argument="--store", path=args.store
            )
        with connected(args.ray):
            yield partial(cluster.outcomes, args)
