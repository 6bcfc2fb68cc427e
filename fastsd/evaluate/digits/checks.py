"""The checks of the digits model: each takes generated digits, and returns its result, its rule and the verdict."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastsd.evaluate.digits.measures import canonical, diversity, effect, novelty
from fastsd.evaluate.digits.reader import DigitReader, read
from fastsd.evaluate.digits.samples import GeneratedDigits
from fastsd.train.strokes import STYLE_WORDS, measure

MIN_READER_ACCURACY = 0.99
MIN_READ_SHARE = 0.97
MIN_EFFECT_ERRORS, MIN_EFFECT_SHARE = 3.0, 0.5
MIN_DIVERSITY = 0.8
MIN_MEDIAN_NOVELTY = 1.0
MIN_NOVELTY = 0.5  # none of 1,000 held-out real digits falls below it; 97 % of 1,000 enlarged copies do


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        name, figure, rule: texts; the name is also the key in the JSON report.
        passed: whether the rule holds.
        values: the numbers for the JSON report. Its keys are part of the format, so they keep their names.
    """

    name: str
    figure: str
    rule: str
    passed: bool
    values: dict[str, Any] = field(default_factory=dict)


def check_reader(reader: DigitReader, images: torch.Tensor, labels: NDArray[np.generic]) -> Check:
    """The reader is accurate on held-out real digits `[N, H, W]`; the other checks rely on it."""
    share = float((read(reader, images).numpy() == labels).mean())
    return Check(
        "reader on real digits",
        f"{share:.2%} of {len(labels)}",
        f">= {MIN_READER_ACCURACY:.0%}",
        share >= MIN_READER_ACCURACY,
        {"share": share},
    )


def check_correct(reader: DigitReader, generated: GeneratedDigits, least: float = MIN_READ_SHARE) -> Check:
    """The reader recognises the digits that the prompts name."""
    correct = read(reader, generated.images).numpy() == generated.digits
    share = float(correct.mean())
    by_digit = {int(d): float(correct[generated.digits == d].mean()) for d in np.unique(generated.digits)}
    worst = min(by_digit, key=lambda d: by_digit[d])
    return Check(
        "read as asked",
        f"{share:.1%} of {len(correct)}; worst: {worst}, {by_digit[worst]:.0%}",
        f">= {least:.0%}",
        share >= least,
        {"share": share, "by_digit": by_digit},
    )


def check_style(name: str, low: GeneratedDigits, high: GeneratedDigits, real: float) -> Check:
    """A style word changes its measure significantly, and by at least half of the difference in real images.

    Args:
        name: a key of `STYLE_WORDS`. low, high: paired images. real: from `measures.real_effects`.
    """
    before, after = (getattr(measure(generated.images.numpy()), name) for generated in (low, high))
    shift = effect(before, after, real)
    words = STYLE_WORDS[name]
    return Check(
        f"{words[1]} against {words[0]}",
        f"{shift.generated:+.3g} ± {shift.error:.2g} ({shift.generated / real:.0%} of real)",
        f"> {MIN_EFFECT_ERRORS:g} errors, >= {MIN_EFFECT_SHARE:.0%}",
        shift.generated > MIN_EFFECT_ERRORS * shift.error and shift.generated >= MIN_EFFECT_SHARE * real,
        {
            "drawn": shift.generated,
            "error": shift.error,
            "real": real,
            "low": float(before.mean()),
            "high": float(after.mean()),
        },
    )


def check_diversity(generated: GeneratedDigits, real: torch.Tensor, labels: NDArray[np.generic]) -> Check:
    """Generated images of a digit are about as far apart as real ones. The rule is on the mean over digits.

    Also reported: the same without position, slant and size (`canonical`), which exposes one shape at many sizes.
    """
    ratios = diversity(generated.images, generated.digits, real, labels)
    shapes = diversity(canonical(generated.images), generated.digits, canonical(real), labels)
    mean, worst = float(np.mean(list(ratios.values()))), min(ratios, key=lambda d: ratios[d])
    shape_mean = float(np.mean(list(shapes.values())))
    return Check(
        "distance in pairs / real",
        f"{mean:.2f}; least: {worst}, {ratios[worst]:.2f}; shapes alone {shape_mean:.2f}",
        f"mean >= {MIN_DIVERSITY:g}",
        mean >= MIN_DIVERSITY,
        {"mean": mean, "by_digit": ratios, "shapes_mean": shape_mean, "shapes_by_digit": shapes},
    )


def check_novelty(generated: GeneratedDigits, training: torch.Tensor, held_out: torch.Tensor) -> Check:
    """No generated image is a copy of a training image; see `measures.novelty`.

    Args:
        training: `[M, 32, 32]` from `canonical`. held_out: real images `[K, H, W]` outside it, for comparison.
    """
    ratios, real = novelty(canonical(generated.images), training), novelty(canonical(held_out), training)
    median, least = float(np.median(ratios)), float(ratios.min())
    return Check(
        "novelty",
        f"median {median:.2f}, least {least:.2f} (held-out real: {np.median(real):.2f}, {real.min():.2f})",
        f"median > {MIN_MEDIAN_NOVELTY:g}, least > {MIN_NOVELTY:g}",
        median > MIN_MEDIAN_NOVELTY and least > MIN_NOVELTY,
        {"median": median, "least": least, "real_median": float(np.median(real)), "real_least": float(real.min())},
    )
