"""The bundled model, quickly: what `make digits-report` checks in full, on few drawings at default settings."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fastsd.evaluate.checks import check_right, check_style
from fastsd.evaluate.measures import real_effects
from fastsd.evaluate.reader import Reader
from fastsd.evaluate.report import as_drawn
from fastsd.evaluate.samples import draw, plain_prompt, style_prompt
from fastsd.pipeline import Pipeline
from fastsd.train.digits import Digits
from fastsd.train.settings import Data


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    yield Pipeline.from_pretrained()


def test_digits_are_read_as_asked(pipe: Pipeline, reader: Reader) -> None:
    """10 digits, 8 seeds. The full report asks for 97 % of 500; here 74 of 80 (92 %) will do.

    Binomial: a model that is right 97 % of the time has 74 or more of 80 with probability 0.990, one that is right 85 %
    of the time with 0.035. The seeds are fixed, so on one machine the count does not vary at all.
    """
    assert check_right(reader, draw(pipe, plain_prompt, seeds=8), least=0.92).passed


def test_thick_is_thicker_than_thin(pipe: Pipeline, some_training: Digits) -> None:
    """By more than 3 standard errors, and by at least half of what the words mean on real pictures: 20 pairs."""
    thin, thick = (
        draw(pipe, lambda d, _, form=form: style_prompt(form, d), seeds=2) for form in ("a thin {}", "a thick {}")
    )
    real = real_effects(*as_drawn(some_training, 6000), Data.style_share)["thickness"]
    assert check_style("thickness", thin, thick, real).passed
