"""What is asked of the digits model: each check takes drawings, and says its figure, its rule and whether it holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastsd.evaluate.measures import canonical, diversity, effect, novelty
from fastsd.evaluate.reader import Reader, read
from fastsd.evaluate.samples import Drawn
from fastsd.train.strokes import STYLE_WORDS, measure

READER_LEAST = 0.99
READ_LEAST = 0.97
EFFECT_ERRORS, EFFECT_SHARE = 3.0, 0.5
DIVERSITY_LEAST = 0.8
NOVELTY_MEDIAN = 1.0
COPY = 0.5  # of 1,000 held-out real digits none is as near to a training picture; of 1,000 enlarged copies 97 % are


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        name, figure, rule: texts. passed: whether the rule holds. values: the figures as numbers, for `--json`.
    """

    name: str
    figure: str
    rule: str
    passed: bool
    values: dict[str, Any] = field(default_factory=dict)


def check_reader(reader: Reader, pictures: torch.Tensor, labels: NDArray[np.generic]) -> Check:
    """The judge first: it reads held-out real pictures `[N, H, W]`."""
    share = float((read(reader, pictures).numpy() == labels).mean())
    return Check(
        "reader on real digits",
        f"{share:.2%} of {len(labels)}",
        f">= {READER_LEAST:.0%}",
        share >= READER_LEAST,
        {"share": share},
    )


def check_right(reader: Reader, drawn: Drawn, least: float = READ_LEAST) -> Check:
    """Drawings are read as what was asked for."""
    right = read(reader, drawn.pictures).numpy() == drawn.digits
    share = float(right.mean())
    by_digit = {int(d): float(right[drawn.digits == d].mean()) for d in np.unique(drawn.digits)}
    worst = min(by_digit, key=lambda d: by_digit[d])
    return Check(
        "read as asked",
        f"{share:.1%} of {len(right)}; worst: {worst}, {by_digit[worst]:.0%}",
        f">= {least:.0%}",
        share >= least,
        {"share": share, "by_digit": by_digit},
    )


def check_style(name: str, low: Drawn, high: Drawn, real: float) -> Check:
    """A style word moves its measure: significantly, and at least half as far as it does in real pictures.

    Args:
        name: a key of `STYLE_WORDS`. low, high: drawings in pairs. real: from `measures.real_effects`.
    """
    before, after = (getattr(measure(drawn.pictures.numpy()), name) for drawn in (low, high))
    found = effect(before, after, real)
    words = STYLE_WORDS[name]
    return Check(
        f"{words[1]} against {words[0]}",
        f"{found.drawn:+.3g} ± {found.error:.2g} ({found.drawn / real:.0%} of real)",
        f"> {EFFECT_ERRORS:g} errors, >= {EFFECT_SHARE:.0%}",
        found.drawn > EFFECT_ERRORS * found.error and found.drawn >= EFFECT_SHARE * real,
        {
            "drawn": found.drawn,
            "error": found.error,
            "real": real,
            "low": float(before.mean()),
            "high": float(after.mean()),
        },
    )


def check_diversity(drawn: Drawn, real: torch.Tensor, labels: NDArray[np.generic]) -> Check:
    """Drawings of a digit lie about as far apart as real ones. The rule is on the mean over digits.

    Also reported: the same without position, slant and size (`canonical`), so that one shape at many sizes shows.
    """
    ratios = diversity(drawn.pictures, drawn.digits, real, labels)
    shapes = diversity(canonical(drawn.pictures), drawn.digits, canonical(real), labels)
    mean, worst = float(np.mean(list(ratios.values()))), min(ratios, key=lambda d: ratios[d])
    shape_mean = float(np.mean(list(shapes.values())))
    return Check(
        "distance in pairs / real",
        f"{mean:.2f}; least: {worst}, {ratios[worst]:.2f}; shapes alone {shape_mean:.2f}",
        f"mean >= {DIVERSITY_LEAST:g}",
        mean >= DIVERSITY_LEAST,
        {"mean": mean, "by_digit": ratios, "shapes_mean": shape_mean, "shapes_by_digit": shapes},
    )


def check_novelty(drawn: Drawn, training: torch.Tensor, held_out: torch.Tensor) -> Check:
    """No drawing is a copy of a training picture; see `measures.novelty`.

    Args:
        training: `[M, 32, 32]` from `canonical`. held_out: real pictures `[K, H, W]` outside it, for comparison.
    """
    ratios, real = novelty(canonical(drawn.pictures), training), novelty(canonical(held_out), training)
    median, least = float(np.median(ratios)), float(ratios.min())
    return Check(
        "novelty",
        f"median {median:.2f}, least {least:.2f} (held-out real: {np.median(real):.2f}, {real.min():.2f})",
        f"median > {NOVELTY_MEDIAN:g}, least > {COPY:g}",
        median > NOVELTY_MEDIAN and least > COPY,
        {"median": median, "least": least, "real_median": float(np.median(real)), "real_least": float(real.min())},
    )
