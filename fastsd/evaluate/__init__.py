"""Evaluation: `python -m fastsd evaluate` draws digits and checks that they are right, various and new."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `fastsd evaluate`."""
    parser.add_argument("--model", default="digits", metavar="FOLDER", help="a digits model (default: the bundled one)")
    parser.add_argument(
        "--data", default="data/mnist", metavar="DIR", help="MNIST's four .gz files (default: %(default)s)"
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=None,
        metavar="N",
        help="drawings of each digit (default: 50; of each style at most 20)",
    )
    parser.add_argument("--quick", action="store_true", help="8 seeds, a shorter trained reader, no search for copies")
    parser.add_argument("--reader", metavar="FILE", help="the digit reader's weights; trained and written if missing")
    parser.add_argument("--out", metavar="DIR", help="write a sheet of drawings, digits.png, into this folder")
    parser.add_argument("--json", metavar="FILE", help="write all figures to this file")
    parser.add_argument("--overwrite", action="store_true", help="replace digits.png and the file of figures")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", help="auto, fp32, fp16 or bf16 (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Evaluate as the flags say: the table on standard output, progress on standard error.

    Returns:
        0 when every check passes, else 1.

    Raises:
        FastsdError: no such model or data, files in the way.
    """
    from fastsd.errors import FastsdError
    from fastsd.evaluate import report
    from fastsd.evaluate import samples as drawing
    from fastsd.files import write_whole
    from fastsd.image.files import encode
    from fastsd.pipeline import Pipeline

    seeds = (report.QUICK_SEEDS if args.quick else 50) if args.seeds is None else args.seeds
    if not 2 <= seeds <= 1000:
        raise FastsdError(f"--seeds is {seeds}; it should be 2 to 1000")
    picture = Path(args.out) / "digits.png" if args.out else None
    figures = Path(args.json) if args.json else None
    for flag, file in (("--out", picture), ("--json", figures)):
        if file is not None:
            _make_room(flag, file, args.overwrite)

    def progress(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    pipe = Pipeline.from_pretrained(args.model, device=args.device, dtype=args.dtype)
    reader_file = Path(args.reader) if args.reader else None
    results = []
    for check in report.evaluate(pipe, args.data, seeds, args.quick, reader_file, progress):
        print(report.line(check), flush=True)
        results.append(check)
    if picture is not None:
        write_whole(picture, encode(drawing.sheet(pipe), ".png", {}), args.overwrite)
        print(picture)
    if figures is not None:
        write_whole(figures, report.to_json(results, str(args.model), seeds).encode(), args.overwrite)
        print(figures)
    return 0 if all(check.passed for check in results) else 1


def _make_room(flag: str, file: Path, overwrite: bool) -> None:
    """See before the work that `file` can be written.

    Raises:
        FastsdError: it is there already, or its folder cannot be made.
    """
    from fastsd.errors import FastsdError
    from fastsd.files import reason

    if file.exists() and not overwrite:
        raise FastsdError(f"{flag} {file}: the file is there already; --overwrite replaces it")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FastsdError(f"{flag} {file}: cannot write there: {reason(error)}") from error
