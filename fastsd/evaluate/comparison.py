"""`fastsd compare A B`: two models, or one under two settings, with the same captions and seeds; or two reports."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from fastsd.errors import FastsdError
from fastsd.evaluate import add_metric_arguments, check_writable, say
from fastsd.evaluate.generated import generate
from fastsd.evaluate.images import Pixels
from fastsd.evaluate.measure import Measurement
from fastsd.evaluate.pairs import psnr, ssim
from fastsd.evaluate.report import Report, better, check_comparable, interval, read_report, shown
from fastsd.files import write_whole
from fastsd.generate.lora_flags import adapters_of, add_lora_arguments, put_on, titled_with
from fastsd.generate.settings_text import parse_settings
from fastsd.image.drawing import enlarged, labelled, shrunk, stacked, titled
from fastsd.image.files import encode

if TYPE_CHECKING:
    from fastsd.pipeline import Pipeline
    from fastsd.weights.adapters.apply import Adapter

IMAGES = 8  # without --metrics
DEFAULT_OUT = "compare.png"
MAX_ROWS, MIN_CELL, MAX_CELL = 12, 128, 256
AMPLIFIED = 4  # the difference that is shown


@dataclass(frozen=True)
class PairFigures:
    """How near two images of one caption and seed are: `psnr` in decibels, `ssim`."""

    psnr: float
    ssim: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `fastsd compare`."""
    parser.add_argument("first", metavar="A", help="a model, or a report of fastsd evaluate --json")
    parser.add_argument("second", metavar="B", nargs="?", help="another; without it, A under other settings")
    parser.add_argument("--a", default="", metavar="TEXT", help='settings of A: "steps=4 guidance=2"')
    parser.add_argument("--b", default="", metavar="TEXT", help="settings of B")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="what to generate; may be given again")
    parser.add_argument("--data", metavar="DIR", help="captions in place of --prompt, and the real images of --metrics")
    add_lora_arguments(parser, "a", "b")
    parser.add_argument("--out", metavar="FILE", help=f"the image (default: {DEFAULT_OUT})")
    parser.add_argument("--json", metavar="FILE", help="write the figures to this file")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files of --out and --json")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", help="auto, fp32, fp16 or bf16 (default: %(default)s)")
    add_metric_arguments(parser, count=None)


def run(args: argparse.Namespace) -> int:
    """Compare as the flags say; returns the exit code.

    Raises:
        FastsdError: no such model, bad settings, neither prompt nor data, reports that may not be compared.
    """
    first, second = args.first, args.second if args.second is not None else args.first
    reports = [Path(name).suffix == ".json" for name in (first, second)]
    if any(reports):
        if not all(reports):
            raise FastsdError("a report is compared with a report, a model with a model")
        _refuse_flags_of_models(args)
        return _compare_reports(Path(first), Path(second))
    settings = [parse_settings(args.a, "--a"), parse_settings(args.b, "--b")]
    flags = {"--lora": args.lora, "--lora-a": args.lora_a, "--lora-b": args.lora_b}
    both, *own = (adapters_of(given or (), flag) for flag, given in flags.items())
    adapters = [both + side for side in own]
    if second == first and settings[0] == settings[1] and adapters[0] == adapters[1]:
        raise FastsdError("A and B are the same; name another model, or settings: --a steps=4 --b steps=20")
    if args.count is None:
        args.count = IMAGES if args.metrics is None else 500
    out, json_file = Path(args.out or DEFAULT_OUT), Path(args.json) if args.json else None
    if out.suffix.lower() not in (".png", ".webp", ".jpg", ".jpeg"):
        raise FastsdError("it should end in .png, .webp or .jpg", argument="--out", path=out)
    for flag, file in (("--out", out), ("--json", json_file)):
        if file is not None:
            check_writable(flag, file, args.overwrite)
    measurement, prompts = _prompts(args)
    sides = _sides(args, (first, second), settings, adapters, prompts, measurement)
    pairs = compare_images(sides[0].images, sides[1].images)
    print(to_markdown(sides, pairs), end="")
    canvas = draw([side.images for side in sides], [side.label for side in sides], prompts, pairs)
    write_whole(out, encode(canvas, out.suffix.lower(), {}), args.overwrite)
    print(out)
    if json_file is not None:
        write_whole(json_file, to_json(sides, pairs, prompts).encode(), args.overwrite)
        print(json_file)
    return 0


@dataclass(frozen=True)
class Side:
    """One of the two: its label, its images, its figures where --metrics asks for some."""

    label: str
    images: list[Pixels]
    report: Report | None


def _refuse_flags_of_models(args: argparse.Namespace) -> None:
    """Refuse flags of models beside two reports, whose figures are there already."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    for name, value in vars(args).items():
        if name not in ("first", "second") and value != parser.get_default(name):
            flag = f"--{name.replace('_', '-')}"
            raise FastsdError("has an effect between models alone; two reports are printed as a table", argument=flag)


def _prompts(args: argparse.Namespace) -> tuple[Measurement | None, list[str]]:
    """The measurement that --metrics and --data ask for, and the prompts."""
    if args.metrics is not None:
        if args.data is None or args.prompt:
            raise FastsdError("needs --data, whose captions are the prompts, and no --prompt", argument="--metrics")
        measurement = Measurement.of(args)
        return measurement, [prompt.text for prompt in measurement.prompts]
    if not 1 <= args.count <= 1000:
        raise FastsdError("it should be 1 to 1000", argument="--count", value=args.count)
    if args.data is not None and not args.prompt:
        from fastsd.evaluate.generated import choose_prompts
        from fastsd.evaluate.images import read_images

        return None, [prompt.text for prompt in choose_prompts(read_images(Path(args.data)), args.count, args.seed)]
    if not args.prompt or args.data is not None:
        raise FastsdError("needs what to generate: either --prompt or --data", argument="compare")
    return None, [args.prompt[k % len(args.prompt)] for k in range(args.count)]


def _sides(
    args: argparse.Namespace,
    models: tuple[str, str],
    settings: list[dict[str, Any]],
    adapters: list[list[Adapter]],
    prompts: list[str],
    measurement: Measurement | None,
) -> list[Side]:
    """Generate with both; one model is loaded once."""
    from fastsd.pipeline import Pipeline

    sides: list[Side] = []
    pipe: Pipeline | None = None
    for model, own, put in zip(models, settings, adapters):
        if pipe is None or model != models[0]:
            pipe = Pipeline.from_pretrained(model, device=args.device, dtype=args.dtype)
        if any(adapters):
            for note in put_on(pipe, put, args):
                say(f"note: {note}")
        title = titled_with(str(model), put)
        name = " ".join([title, *(f"{k.replace('num_inference_', '')}={v}" for k, v in own.items())])
        say(f"{'AB'[len(sides)]}: {name}")
        images = generate(pipe, prompts, args.seed, own, say)
        report = None if measurement is None else measurement.take(pipe, images, own, title)
        sides.append(Side(f"{'AB'[len(sides)]}: {name}", images, report))
    return sides


def compare_images(a: Sequence[Pixels], b: Sequence[Pixels]) -> list[PairFigures]:
    """Of each two images; none where the two models make other sizes."""
    if a[0].shape != b[0].shape:
        return []
    return [PairFigures(psnr(one, other), ssim(one, other)) for one, other in zip(a, b)]


def means(pairs: Sequence[PairFigures]) -> dict[str, float]:
    """Mean PSNR over pairs that differ, mean SSIM, and how many are equal in every pixel."""
    finite = [pair.psnr for pair in pairs if math.isfinite(pair.psnr)]
    return {
        "psnr": float(np.mean(finite)) if finite else math.inf,
        "ssim": float(np.mean([pair.ssim for pair in pairs])),
        "equal": float(sum(not math.isfinite(pair.psnr) for pair in pairs)),
    }


def to_markdown(sides: Sequence[Side], pairs: Sequence[PairFigures]) -> str:
    """The figures of the pairs, and a table of the metrics."""
    lines = [f"- {side.label}" for side in sides]
    if pairs:
        found = means(pairs)
        lines += [
            f"- {len(pairs)} pairs of one prompt and seed: PSNR {found['psnr']:.1f} dB, SSIM {found['ssim']:.3f}, "
            f"{found['equal']:.0f} equal in every pixel"
        ]
    else:
        sizes = [f"{side.images[0].shape[1]} x {side.images[0].shape[0]}" for side in sides]
        lines.append(f"- no PSNR and SSIM: the images have different sizes, {' and '.join(sizes)}")
    one, other = (side.report for side in sides)
    if one is not None and other is not None:
        lines += ["", *_table(one, other)]
    return "\n".join(lines) + "\n"


def _table(one: Report, other: Report) -> list[str]:
    """A row for each figure that both have."""
    lines = ["| metric | A | B | better |", "|---|---|---|---|"]
    for name, a in one.figures.items():
        if name not in other.figures:
            continue
        b = other.figures[name]
        lower = better(name) == "lower"
        apart = None not in (a.low, b.low) and (a.high < b.low or b.high < a.low)  # type: ignore[operator]
        verdict = ("A" if (a.value < b.value) == lower else "B") if apart else "neither: the intervals overlap"
        if a.low is None or b.low is None:
            verdict = "unknown: no intervals"
        cells = (f"{shown(figure.value)} ({interval(figure)})" for figure in (a, b))
        lines.append(f"| {name} | {' | '.join(cells)} | {verdict} |")
    return lines


def to_json(sides: Sequence[Side], pairs: Sequence[PairFigures], prompts: Sequence[str]) -> str:
    """Everything in a machine-readable form; the PSNR of equal images is null."""
    import json

    whole = {
        "labels": [side.label for side in sides],
        "prompts": list(prompts),
        "pairs": [{"psnr": pair.psnr if math.isfinite(pair.psnr) else None, "ssim": pair.ssim} for pair in pairs],
        "reports": [None if side.report is None else json.loads(side.report.to_json()) for side in sides],
    }
    return json.dumps(whole, indent=2, ensure_ascii=False) + "\n"


def draw(
    images: Sequence[Sequence[Pixels]], labels: Sequence[str], prompts: Sequence[str], pairs: Sequence[PairFigures]
) -> Image.Image:
    """A row for each prompt: A, B and their difference, made 4 times as strong."""
    rows = []
    for index, (a, b) in enumerate(zip(*images)):
        if index == MAX_ROWS:
            break
        cells = [(_cell(a), f"A: {prompts[index]}"), (_cell(b), f"B: {prompts[index]}")]
        if pairs:
            apart = np.abs(a.astype(int) - b.astype(int)) * AMPLIFIED
            pair = pairs[index]
            how = f"PSNR {pair.psnr:.1f} dB, SSIM {pair.ssim:.3f}" if math.isfinite(pair.psnr) else "equal"
            cells.append((_cell(apart.clip(0, 255).astype(np.uint8)), f"{AMPLIFIED} x |A - B|: {how}"))
        rows.append(cells)
    half = -(-len(rows) // 2)
    if len(rows) > 3 and rows[0][0][0].width <= MIN_CELL:  # two pairs side by side
        rows = [rows[k] + (rows[k + half] if k + half < len(rows) else []) for k in range(half)]
    left = len(images[0]) - min(len(images[0]), MAX_ROWS)
    notes = [*labels, *([f"the first {MAX_ROWS} of {len(images[0])} pairs"] if left else [])]
    return titled(stacked([labelled(rows)]), "The same prompts and seeds", notes)


def _cell(pixels: Pixels) -> Image.Image:
    return enlarged(shrunk(Image.fromarray(pixels), MAX_CELL), MIN_CELL)


def _compare_reports(one: Path, other: Path) -> int:
    """A table of two reports.

    Raises:
        FastsdError: they may not be compared.
    """
    a, b = read_report(one, "A"), read_report(other, "B")
    check_comparable(a, b)
    print("\n".join([f"- A: {a.about['model']}, {one}", f"- B: {b.about['model']}, {other}", "", *_table(a, b)]))
    return 0
