"""Batch jobs: `fastsd batch prompts.jsonl --out DIR` generates what each line of a file asks for."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fastsd.cli import flags
from fastsd.errors import FastsdError
from fastsd.parameters import PARAMETERS
from fastsd.parameters.kinds import MAX_SEED, Parameter, Whole

FORMATS = ("png", "jpg", "webp")
USED = ("embedding", "embedding_dir", "lora", "lora_dir", "allow_partial", "progress")  # of the flags beside parameters
SEED = Parameter(
    "seed", Whole(low=0, high=MAX_SEED), "from which lines without a seed draw theirs (default: random)", ("--seed",)
)


def rows() -> list[Parameter]:
    """The parameters of the job: those of loading, and some that the command line alone has."""
    load = [row for row in PARAMETERS.values() if row.of == "load" and row.flags and row.name != "preview"]
    return [*load, PARAMETERS["batch_size"], *(flags.CLI[name] for name in USED)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `fastsd batch`."""
    parser.add_argument("prompts", metavar="FILE", help="a request a line: .jsonl, .csv or .parquet (docs/batch.md)")
    parser.add_argument("--out", required=True, metavar="DIR", help="for the images and manifest.jsonl; a new folder")
    parser.add_argument("--format", choices=FORMATS, default="png", help="of the images (default: %(default)s)")
    parser.add_argument(*SEED.flags, metavar="N", help=SEED.help)
    parser.add_argument("--strict", action="store_true", help="check every line first, and stop at the first bad one")
    for row in rows():
        flags.add_flag(parser, row)
    parser.set_defaults(taesd=False, preview=None)


def run(args: argparse.Namespace) -> int:
    """Do the lines that are not done yet.

    Returns:
        0 when every line has its images, 1 when some failed.

    Raises:
        FastsdError: a file or a flag that is wrong; with --strict, a bad line.
    """
    from fastsd.batch.lines import BadLine
    from fastsd.batch.manifest import open_manifest
    from fastsd.batch.work import BatchWork, identity, requests

    for row in rows():
        flags.read_value(args, row)
    flags.read_value(args, SEED)
    path = Path(args.prompts)
    head = identity(args, path)
    if args.strict:
        for line in requests(path, 0):
            if isinstance(line, BadLine):
                raise FastsdError(f"line {line.number}: {line.said}", argument="prompts", path=path)
    with open_manifest(Path(args.out), head) as manifest:
        work = BatchWork(args, path, manifest)
        work.run()
    failed = len(manifest.failed)
    print(f"{len(manifest.done)} done, {failed} failed: {manifest.path}")
    sys.stdout.flush()
    return 1 if failed else 0
