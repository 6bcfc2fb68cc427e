"""The checks in order, on a model and MNIST; their table and their JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from fastsd.evaluate import checks
from fastsd.evaluate.checks import Check
from fastsd.evaluate.measures import canonical, real_effects
from fastsd.evaluate.reader import load_reader, save_reader, train_reader
from fastsd.evaluate.samples import Progress, draw, draw_styles, plain_prompt
from fastsd.train.digits import Digits, augment, enlarge, read_digits
from fastsd.train.settings import Data

if TYPE_CHECKING:
    from fastsd.pipeline import Pipeline

QUICK_SEEDS = 8
QUICK_EPOCHS = 2
STYLE_SEEDS = 20  # at most; 200 pairs give a standard error of a few hundredths of the effect
REAL_PICTURES = 20_000  # for the style words' effects
REAL_OF_A_DIGIT = 500  # for diversity
HELD_OUT = 1_000


def evaluate(
    pipe: Pipeline, folder: str | Path, seeds: int, quick: bool, reader_file: Path | None, progress: Progress
) -> Iterator[Check]:
    """Every check of the digits model, as it is done.

    Args:
        folder: of MNIST's four files. seeds: drawings of each digit. quick: fewer, and without the search for copies.
        reader_file: the reader's weights; where the file is missing, it is written after training.
        progress: is told what is going on, a line each.

    Raises:
        FastsdError: MNIST or the reader's weights cannot be read.
    """
    training, held_out = read_digits(folder), read_digits(folder, "t10k")
    if reader_file is not None and reader_file.is_file():
        reader = load_reader(reader_file)
    else:
        progress("training the digit reader on the real training set (one to three minutes)")
        epochs = {"epochs": QUICK_EPOCHS} if quick else {}
        reader = train_reader(training.images, training.labels, report=progress, **epochs)
        if reader_file is not None:
            save_reader(reader, reader_file)
    yield checks.check_reader(reader, torch.from_numpy(held_out.images.copy()).float() / 255, held_out.labels)

    progress(f"drawing {10 * seeds} digits")
    drawn = draw(pipe, plain_prompt, seeds)
    yield checks.check_right(reader, drawn)
    real, labels = as_drawn(training, REAL_PICTURES)
    effects = real_effects(real, labels, Data.style_share)
    for name, (low, high) in draw_styles(pipe, min(seeds, STYLE_SEEDS), progress).items():
        yield checks.check_style(name, low, high, effects[name])
    few = np.concatenate([np.flatnonzero(labels == digit)[:REAL_OF_A_DIGIT] for digit in range(10)])
    yield checks.check_diversity(drawn, real[few], labels[few])
    if not quick:
        progress("looking for copies among the training pictures")
        parts = [canonical(enlarge(part)) for part in np.array_split(training.images, 60)]
        yield checks.check_novelty(drawn, torch.cat(parts), as_drawn(held_out, HELD_OUT)[0])


def as_drawn(digits: Digits, count: int) -> tuple[torch.Tensor, np.ndarray]:
    """The first `count` pictures with the sizes and slants that the model is trained on, and their labels."""
    generator = np.random.default_rng(0)
    images = digits.images[:count]
    parts = [
        augment(part, generator, Data.scales, Data.shear) for part in np.array_split(images, -(-len(images) // 500))
    ]
    return torch.cat(parts), digits.labels[:count]


def line(check: Check) -> str:
    """One row of the table."""
    return f"{'pass' if check.passed else 'FAIL'}  {check.name:<36} {check.figure:<60} {check.rule}"


def to_json(results: list[Check], model: str, seeds: int) -> str:
    """All figures, for programs."""
    found = {
        check.name: {"passed": check.passed, "figure": check.figure, "rule": check.rule, **check.values}
        for check in results
    }
    return json.dumps({"model": model, "seeds": seeds, "checks": found}, indent=2) + "\n"
