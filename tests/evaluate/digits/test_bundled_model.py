"""A quick evaluation of the bundled model at default settings; `make digits-report` runs the full one."""

from __future__ import annotations

import pytest

from fastsd.evaluate.digits.checks import check_correct, check_style
from fastsd.evaluate.digits.measures import real_effects
from fastsd.evaluate.digits.reader import DigitReader
from fastsd.evaluate.digits.report import augmented
from fastsd.evaluate.digits.samples import STYLE_PROMPTS, generate_digits, plain_prompt, style_prompt
from fastsd.pipeline import Pipeline
from fastsd.train.digits import Digits
from fastsd.train.settings import DigitsData


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.from_pretrained()


def test_digits_are_read_as_prompted(pipe: Pipeline, reader: DigitReader) -> None:
    """10 digits, 8 seeds. The full evaluation requires 97 % of 500; 74 of 80 (92 %) are enough here.

    Binomial: a model that is right 97 % of the time gets 74 or more of 80 with probability 0.990, one that is right
    85 % of the time with probability 0.035. The seeds are fixed, so on one machine the count does not vary at all.
    """
    assert check_correct(reader, generate_digits(pipe, plain_prompt, seeds=8), least=0.92).passed


def test_thick_is_thicker_than_thin(pipe: Pipeline, training_subset: Digits) -> None:
    """By more than 3 standard errors, and by at least half of the difference in real images: 20 pairs."""
    thin, thick = (
        generate_digits(pipe, lambda digit, _, form=form: style_prompt(form, digit), seeds=2)
        for form in STYLE_PROMPTS["thickness"]
    )
    real = real_effects(*augmented(training_subset, 6000), DigitsData.style_share)["thickness"]
    assert check_style("thickness", thin, thick, real).passed
