"""Captions: repeatable, true to the measures, made of known words."""

from __future__ import annotations

import re

import numpy as np
import pytest

from fastsd.train.captions import DIGIT_WORDS, KNOWN_WORDS, caption

WORDS_OF = (("thin", "thick"), ("left", "right"), ("small", "large"))


def many(label: int, style: tuple[int, int, int], count: int = 400, **shares: float) -> list[str]:
    generator = np.random.default_rng(3)
    return [caption(label, style, generator, **shares) for _ in range(count)]


def test_the_same_seed_gives_the_same_captions() -> None:
    assert many(4, (1, 0, -1)) == many(4, (1, 0, -1))
    assert len(set(many(4, (1, 0, -1)))) > 50


@pytest.mark.parametrize("style", [(0, 0, 0), (1, 0, 0), (-1, 1, 0), (0, -1, 1), (1, 1, -1)])
def test_captions_say_what_was_measured_and_nothing_else(style: tuple[int, int, int]) -> None:
    for label in (1, 8):
        texts = many(label, style, empty=0.0, unknown=0.0)
        seen = {word for text in texts for word in text.split()}
        assert seen <= set(KNOWN_WORDS)
        for end, pair in zip(style, WORDS_OF):
            assert seen & set(pair) == ({pair[end > 0]} if end else set())
        for text in texts:
            names = {word for word in text.split() if word in DIGIT_WORDS or word.isdigit()}
            assert names in ({str(label)}, {DIGIT_WORDS[label]})
            assert ("slanted" in text) == bool(re.search("left|right", text))


def test_shares_of_empty_captions_and_style_words() -> None:
    count = 4000
    texts = many(3, (1, 0, 0), count, empty=0.12, unknown=0.0)
    empty = texts.count("") / count
    spoken = sum("thick" in text for text in texts) / count
    # Four standard deviations of a share of 4,000.
    assert empty == pytest.approx(0.12, abs=4 * (0.12 * 0.88 / count) ** 0.5)
    assert spoken == pytest.approx(0.88 / 2, abs=4 * (0.44 * 0.56 / count) ** 0.5)


def test_unknown_words_stand_beside_the_known_and_alone() -> None:
    texts = many(7, (0, 0, 0), 2000, empty=0.0, unknown=0.5)
    strange = [set(re.findall(r"\w+", text)) - set(KNOWN_WORDS) for text in texts]
    named = ["7" in text or "seven" in text for text in texts]
    assert sum(bool(words) and name for words, name in zip(strange, named)) > 300
    assert sum(bool(words) and not name for words, name in zip(strange, named)) > 300


def test_an_before_a_vowel() -> None:
    for text in many(8, (0, 0, 0), unknown=0.0):
        assert not text.startswith("a eight")
