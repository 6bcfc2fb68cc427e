"""What a measurement found, as JSON, as Markdown, and as a sheet of images; and which two may be compared."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from fastsd.errors import FastsdError
from fastsd.evaluate.images import Pixels
from fastsd.evaluate.metrics import METRICS
from fastsd.evaluate.resample import CONFIDENCE, Figure
from fastsd.files import reason
from fastsd.image.drawing import enlarged, labelled, shrunk

FORMAT = "fastsd evaluation 1"
MAX_REPORT = 2**26  # bytes
COLUMNS, MAX_CELLS = 8, 64
MIN_CELL, MAX_CELL = 96, 256  # pixels
# Two figures may be compared where all of these are equal; the text says what differs.
SAME = {
    "extractor": "the extractors of their features",
    "clip": "the models of the CLIP score",
    "data": "the real images",
    "size": "the size of the images",
    "count": "the number of generated images",
    "reference": "the number of real images",
}


@dataclass(frozen=True)
class Report:
    """A measurement.

    Attributes:
        figures: by name, "fid".
        about: what they depend on: "model", "settings", "seed", and the keys of `SAME`.
        prompts: of the images, in order.
    """

    figures: dict[str, Figure]
    about: dict[str, Any]
    prompts: tuple[str, ...] = ()

    def to_json(self) -> str:
        figures = {
            name: {"value": figure.value, "low": figure.low, "high": figure.high}
            for name, figure in self.figures.items()
        }
        whole = {"format": FORMAT, **self.about, "confidence": CONFIDENCE, "figures": figures, "prompts": self.prompts}
        return json.dumps(whole, indent=2, ensure_ascii=False) + "\n"

    def to_markdown(self) -> str:
        """A table of the figures, and what they depend on."""
        about = self.about
        lines = [
            f"# Evaluation of {about['model']}",
            "",
            f"| metric | value | {CONFIDENCE:.0%} interval |",
            "|---|---|---|",
            *(f"| {name} | {shown(figure.value)} | {interval(figure)} |" for name, figure in self.figures.items()),
            "",
            f"- features: {about['extractor']}" + (f"; CLIP score: {about['clip']}" if about["clip"] else ""),
            f"- {about['count']} generated images, seeds {about['seed']} to {about['seed'] + about['count'] - 1}, "
            f"{about['size'][0]} x {about['size'][1]} pixels",
            f"- {about['reference']} real images of {about['data']['folder']} "
            f"(sha256 of names and captions {about['data']['sha256'][:12]})",
            f"- settings: {' '.join(f'{k}={v}' for k, v in about['settings'].items()) or 'those of the model'}",
            f"- intervals: {about['bootstrap']} bootstrap rounds over the generated images, seed {about['seed']}",
        ]
        return "\n".join(lines) + "\n"


def shown(value: float) -> str:
    """A figure with four digits."""
    return format(value, ".4g")


def interval(figure: Figure) -> str:
    """ "1.2 to 1.4"."""
    if figure.low is None or figure.high is None:
        return "-"
    return f"{shown(figure.low)} to {shown(figure.high)}"


def read_report(path: Path, argument: str) -> Report:
    """A report that `fastsd evaluate --json` wrote.

    Raises:
        FastsdError: it cannot be read, or is none.
    """
    try:
        if path.stat().st_size > MAX_REPORT:
            raise FastsdError(f"has more than {MAX_REPORT} bytes", argument=argument, path=path)
        whole = json.loads(path.read_text(encoding="utf-8"))
        if whole["format"] != FORMAT:
            raise KeyError("format")
        figures = {
            str(name): Figure(*(None if row[key] is None else float(row[key]) for key in ("value", "low", "high")))  # type: ignore[arg-type]
            for name, row in whole["figures"].items()
        }
        about = {key: whole[key] for key in ("model", "settings", "seed", "bootstrap", *SAME)}
        if any(figure.value is None for figure in figures.values()) or not isinstance(about["data"], dict):
            raise ValueError
        return Report(figures, about)
    except OSError as error:
        raise FastsdError(reason(error), argument=argument, path=path) from error
    except FastsdError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FastsdError("is no report of fastsd evaluate", argument=argument, path=path) from error


def check_comparable(one: Report, other: Report) -> None:
    """Refuse to compare figures that measure different things.

    Raises:
        FastsdError: it says what differs.
    """
    for key, what in SAME.items():
        a, b = one.about[key], other.about[key]
        if key == "data":
            a, b = a.get("sha256"), b.get("sha256")
        if a != b:
            raise FastsdError(f"the reports cannot be compared: {what} differ, {_short(a)} and {_short(b)}")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def better(name: str) -> str:
    """ "lower" or "higher": which way a figure is better."""
    for metric, entry in METRICS.items():
        if name.split(",")[0].split(" ")[0] in metric.split("-"):
            return entry.better
    return "higher"


def sheet(images: list[Pixels], labels: list[str]) -> Image.Image:
    """The first 64 images in rows of 8, each with its caption below."""
    cells = [
        (enlarged(shrunk(Image.fromarray(image), MAX_CELL), MIN_CELL), label)
        for image, label in zip(images[:MAX_CELLS], labels)
    ]
    return labelled([cells[start : start + COLUMNS] for start in range(0, len(cells), COLUMNS)])
