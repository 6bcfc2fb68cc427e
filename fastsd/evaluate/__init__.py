"""Evaluation: `python -m fastsd evaluate` measures how good a model's images are (docs/evaluation.md)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsd.evaluate.digits.limits import DEFAULT_SEEDS, MAX_SEEDS, QUICK_SEEDS, STYLE_SEEDS
from fastsd.generate.lora_flags import adapters_of, add_lora_arguments, put_on, titled_with

if TYPE_CHECKING:
    from fastsd.evaluate.measure import Measurement
    from fastsd.pipeline import Pipeline


# What the flags of the metrics are where they are not given.
METRIC_DEFAULTS: dict[str, Any] = {
    "count": 500,
    "seed": 0,
    "extractor": "pixels",
    "clip": None,
    "gallery": [],
    "reference": 10_000,
    "bootstrap": 100,
    "settings": "",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `fastsd evaluate`."""
    parser.add_argument(
        "-m", "--model", default="digits", metavar="PATH", help="the model (default: the bundled digits)"
    )
    add_lora_arguments(parser)
    parser.add_argument(
        "--data",
        default="data/mnist",
        metavar="DIR",
        help="real images with captions, or the four .gz files of MNIST (default: %(default)s)",
    )
    parser.add_argument("--out", metavar="DIR", help="write the report and a sheet of images to this folder")
    parser.add_argument("--json", metavar="FILE", help="write all results to this file")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files of --out and --json")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", help="auto, fp32, fp16 or bf16 (default: %(default)s)")
    metrics = parser.add_argument_group("metrics of any model")
    add_metric_arguments(metrics)
    metrics.add_argument("--settings", default="", metavar="TEXT", help='of the calls: "steps=20 guidance=2"')
    digits = parser.add_argument_group("the checks of a digits model, where --metrics is not given")
    digits.add_argument(
        "--seeds",
        type=int,
        default=None,
        metavar="N",
        help=f"images of each digit (default: {DEFAULT_SEEDS}; at most {STYLE_SEEDS} for each style)",
    )
    digits.add_argument(
        "--quick",
        action="store_true",
        help=f"{QUICK_SEEDS} seeds, shorter training of the digit reader, no search for copies",
    )
    digits.add_argument(
        "--reader", metavar="FILE", help="weights of the digit reader; trained and saved if the file does not exist"
    )


def add_metric_arguments(group: Any, count: int | None = 500) -> None:
    """The flags that every measurement has; `count` is the default of `--count`."""
    group.add_argument(
        "--metrics",
        metavar="NAMES",
        help="some of fid, kid, is, clip, precision-recall, accuracy, nearest, autoencoder",
    )
    group.add_argument(
        "--count", type=int, default=count, metavar="N", help=f"images to generate (default: {count or '8; 500'})"
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of the first image (default: %(default)s)")
    group.add_argument(
        "--extractor",
        default="pixels",
        metavar="NAME[:FILE]",
        help="what images are compared in: pixels, inception:FILE, reader:FILE or clip:FOLDER (default: %(default)s)",
    )
    group.add_argument("--clip", metavar="FOLDER", help="the CLIP model of the metric clip, as transformers saves it")
    group.add_argument(
        "--gallery", action="append", default=[], metavar="DIR", help="more real images for nearest; may be given again"
    )
    group.add_argument(
        "--reference", type=int, default=10_000, metavar="N", help="real images at most (default: %(default)s)"
    )
    group.add_argument(
        "--bootstrap", type=int, default=100, metavar="N", help="rounds of the intervals (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Evaluate as the flags say: the table on standard output, progress on standard error.

    Returns:
        0; 1 where a check of the digits model fails.

    Raises:
        FastsdError: no such model or data, an unknown metric, an output file exists.
    """
    _check_flags(args)
    if args.metrics is None:
        return _run_digits(args)
    from fastsd.evaluate.measure import Measurement

    return _run_metrics(args, Measurement.of(args))


def _check_flags(args: argparse.Namespace) -> None:
    """Refuse flags that have no effect.

    Raises:
        FastsdError: a flag of the metrics without `--metrics`, or one of the digits' checks beside it.
    """
    from fastsd.errors import FastsdError

    if args.metrics is None:
        for name, default in METRIC_DEFAULTS.items():
            if getattr(args, name) != default:
                raise FastsdError("has an effect beside --metrics alone", argument=f"--{name}")
        return
    for name, given in (("seeds", args.seeds is not None), ("quick", args.quick), ("reader", args.reader is not None)):
        if given:
            raise FastsdError("belongs to the checks of the digits model, not to --metrics", argument=f"--{name}")


def _run_metrics(args: argparse.Namespace, measurement: Measurement) -> int:
    """Measure, print, write the files."""
    from fastsd.evaluate.report import sheet
    from fastsd.files import write_whole
    from fastsd.generate.settings_text import parse_settings
    from fastsd.image.files import encode

    folder = Path(args.out) if args.out else None
    files = {name: folder / name for name in ("report.json", "report.md", "grid.png")} if folder else {}
    settings = parse_settings(args.settings, "--settings")
    for flag, file in (*(("--out", file) for file in files.values()), ("--json", args.json and Path(args.json))):
        if file:
            check_writable(flag, file, args.overwrite)
    pipe, title = _load(args)
    generated = measurement.generate(pipe, settings, say)
    report = measurement.take(pipe, generated, settings, title)
    print(report.to_markdown(), end="")
    if files:
        texts = {"report.json": report.to_json(), "report.md": report.to_markdown()}
        for name, text in texts.items():
            write_whole(files[name], text.encode(), args.overwrite)
        canvas = sheet(generated, [prompt.text for prompt in measurement.prompts])
        write_whole(files["grid.png"], encode(canvas, ".png", {}), args.overwrite)
        print(*files.values(), sep="\n")
    if args.json:
        write_whole(Path(args.json), report.to_json().encode(), args.overwrite)
        print(args.json)
    return 0


def _run_digits(args: argparse.Namespace) -> int:
    """The checks of the digits model."""
    from fastsd.errors import FastsdError
    from fastsd.evaluate.digits import report
    from fastsd.evaluate.digits.samples import contact_sheet
    from fastsd.files import write_whole
    from fastsd.image.files import encode

    seeds = (QUICK_SEEDS if args.quick else DEFAULT_SEEDS) if args.seeds is None else args.seeds
    if not 2 <= seeds <= MAX_SEEDS:
        raise FastsdError(f"it should be 2 to {MAX_SEEDS}", argument="--seeds", value=seeds)
    image_file = Path(args.out) / "digits.png" if args.out else None
    json_file = Path(args.json) if args.json else None
    for flag, file in (("--out", image_file), ("--json", json_file)):
        if file is not None:
            check_writable(flag, file, args.overwrite)
    pipe, title = _load(args)
    reader_file = Path(args.reader) if args.reader else None
    results = []
    for check in report.evaluate(pipe, args.data, seeds, args.quick, reader_file, say):
        print(report.line(check), flush=True)
        results.append(check)
    if image_file is not None:
        write_whole(image_file, encode(contact_sheet(pipe), ".png", {}), args.overwrite)
        print(image_file)
    if json_file is not None:
        write_whole(json_file, report.to_json(results, title, seeds).encode(), args.overwrite)
        print(json_file)
    return 0 if all(check.passed for check in results) else 1


def _load(args: argparse.Namespace) -> tuple[Pipeline, str]:
    """The model with its LoRAs, and its name for reports."""
    from fastsd.pipeline import Pipeline

    adapters = adapters_of(args.lora or ())
    pipe = Pipeline.from_pretrained(args.model, device=args.device, dtype=args.dtype)
    if adapters:
        for note in put_on(pipe, adapters, args):
            say(f"note: {note}")
    return pipe, titled_with(str(args.model), adapters)


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


def check_writable(flag: str, file: Path, overwrite: bool) -> None:
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
