"""Evaluation: `python -m fastsd evaluate` checks that a digits model generates correct, diverse and novel digits."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fastsd.evaluate.limits import DEFAULT_SEEDS, MAX_SEEDS, QUICK_SEEDS, STYLE_SEEDS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `fastsd evaluate`."""
    parser.add_argument("--model", default="digits", metavar="FOLDER", help="a digits model (default: the bundled one)")
    parser.add_argument(
        "--data",
        default="data/mnist",
        metavar="DIR",
        help="folder with the four .gz files of MNIST (default: %(default)s)",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=None,
        metavar="N",
        help=f"images of each digit (default: {DEFAULT_SEEDS}; at most {STYLE_SEEDS} for each style)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"{QUICK_SEEDS} seeds, shorter training of the digit reader, no search for copies",
    )
    parser.add_argument(
        "--reader", metavar="FILE", help="weights of the digit reader; trained and saved if the file does not exist"
    )
    parser.add_argument("--out", metavar="DIR", help="write a sheet of generated digits, digits.png, to this folder")
    parser.add_argument("--json", metavar="FILE", help="write all results to this file")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files of --out and --json")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", help="auto, fp32, fp16 or bf16 (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Evaluate as the flags say: the table on standard output, progress on standard error.

    Returns:
        0 when every check passes, else 1.

    Raises:
        FastsdError: no such model or data, an output file exists.
    """
    from fastsd.errors import FastsdError
    from fastsd.evaluate import report
    from fastsd.evaluate.samples import contact_sheet
    from fastsd.files import write_whole
    from fastsd.image.files import encode
    from fastsd.pipeline import Pipeline

    seeds = (QUICK_SEEDS if args.quick else DEFAULT_SEEDS) if args.seeds is None else args.seeds
    if not 2 <= seeds <= MAX_SEEDS:
        raise FastsdError(f"it should be 2 to {MAX_SEEDS}", argument="--seeds", value=seeds)
    image_file = Path(args.out) / "digits.png" if args.out else None
    json_file = Path(args.json) if args.json else None
    for flag, file in (("--out", image_file), ("--json", json_file)):
        if file is not None:
            _check_writable(flag, file, args.overwrite)

    def progress(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    pipe = Pipeline.from_pretrained(args.model, device=args.device, dtype=args.dtype)
    reader_file = Path(args.reader) if args.reader else None
    results = []
    for check in report.evaluate(pipe, args.data, seeds, args.quick, reader_file, progress):
        print(report.line(check), flush=True)
        results.append(check)
    if image_file is not None:
        write_whole(image_file, encode(contact_sheet(pipe), ".png", {}), args.overwrite)
        print(image_file)
    if json_file is not None:
        write_whole(json_file, report.to_json(results, str(args.model), seeds).encode(), args.overwrite)
        print(json_file)
    return 0 if all(check.passed for check in results) else 1


def _check_writable(flag: str, file: Path, overwrite: bool) -> None:
    """Check that `file` can be written, before the evaluation starts.

    Raises:
        FastsdError: the file exists, or its folder cannot be created.
    """
    from fastsd.errors import FastsdError
    from fastsd.files import reason

    if file.exists() and not overwrite:
        raise FastsdError("the file exists; {overwrite} replaces it", argument=flag, path=file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FastsdError(f"cannot be written: {reason(error)}", argument=flag, path=file) from error
