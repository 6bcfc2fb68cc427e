"""The evaluation of a model: the checks in order, the lines of their table, their JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from fastsd.errors import about
from fastsd.evaluate.digits import checks
from fastsd.evaluate.digits.checks import Check
from fastsd.evaluate.digits.limits import STYLE_SEEDS
from fastsd.evaluate.digits.measures import canonical, real_effects
from fastsd.evaluate.digits.reader import load_reader, save_reader, train_reader
from fastsd.evaluate.digits.samples import Progress, generate_digits, generate_styles, plain_prompt
from fastsd.train.digits import Digits, augment, enlarge, read_digits
from fastsd.train.settings import DigitsData

if TYPE_CHECKING:
    from fastsd.pipeline import Pipeline

QUICK_EPOCHS = 2
EFFECT_IMAGES = 20_000  # real images for the effects of the style words
DIVERSITY_IMAGES = 500  # real images of each digit for the diversity
HELD_OUT_IMAGES = 1_000


def evaluate(
    pipe: Pipeline, folder: str | Path, seeds: int, quick: bool, reader_file: Path | None, progress: Progress
) -> Iterator[Check]:
    """Yield every check of the digits model as it completes.

    Args:
        folder: contains the four files of MNIST.
        seeds: images of each digit.
        quick: train the reader for fewer epochs, and skip the search for copies.
        reader_file: weights of the reader; if the file does not exist, it is written after training.
        progress: receives progress messages, one line each.

    Raises:
        FastsdError: MNIST or the weights of the reader cannot be read.
    """
    training, held_out = read_digits(folder), read_digits(folder, "t10k")
    if reader_file is not None and reader_file.is_file():
        with about("--reader"):
            reader = load_reader(reader_file)
    else:
        progress("training the digit reader on the real training set (one to three minutes)")
        epochs = {"epochs": QUICK_EPOCHS} if quick else {}
        reader = train_reader(training.images, training.labels, report=progress, **epochs)
        if reader_file is not None:
            save_reader(reader, reader_file)
    yield checks.check_reader(reader, torch.from_numpy(held_out.images.copy()).float() / 255, held_out.labels)

    progress(f"generating {10 * seeds} digits")
    generated = generate_digits(pipe, plain_prompt, seeds)
    yield checks.check_correct(reader, generated)
    real, labels = augmented(training, EFFECT_IMAGES)
    effects = real_effects(real, labels, DigitsData.style_share)
    for name, (low, high) in generate_styles(pipe, min(seeds, STYLE_SEEDS), progress).items():
        yield checks.check_style(name, low, high, effects[name])
    subset = np.concatenate([np.flatnonzero(labels == digit)[:DIVERSITY_IMAGES] for digit in range(10)])
    yield checks.check_diversity(generated, real[subset], labels[subset])
    if not quick:
        progress("searching the training images for copies")
        parts = [canonical(enlarge(part)) for part in np.array_split(training.images, 60)]
        yield checks.check_novelty(generated, torch.cat(parts), augmented(held_out, HELD_OUT_IMAGES)[0])


def augmented(digits: Digits, count: int) -> tuple[torch.Tensor, np.ndarray]:
    """The first `count` digits, augmented like the training images of the model, and their labels."""
    generator = np.random.default_rng(0)
    images = digits.images[:count]
    parts = [
        augment(part, generator, DigitsData.scales, DigitsData.shear)
        for part in np.array_split(images, -(-len(images) // 500))
    ]
    return torch.cat(parts), digits.labels[:count]


def line(check: Check) -> str:
    """One row of the table."""
    return f"{'pass' if check.passed else 'FAIL'}  {check.name:<36} {check.figure:<60} {check.rule}"


def to_json(results: list[Check], model: str, seeds: int) -> str:
    """All results in a machine-readable form."""
    by_name = {
        check.name: {"passed": check.passed, "figure": check.figure, "rule": check.rule, **check.values}
        for check in results
    }
    return json.dumps({"model": model, "seeds": seeds, "checks": by_name}, indent=2) + "\n"
