"""Captions are repeatable, match the measured style and use known words."""

from __future__ import annotations

import re

import numpy as np
import pytest

from fastsd.train.captions import DIGIT_WORDS, KNOWN_WORDS, caption

STYLE_PAIRS = (("thin", "thick"), ("left", "right"), ("small", "large"))


def captions(
    label: int,
    style: tuple[int, int, int],
    count: int = 400,
    empty: float = 0.0,
    unknown: float = 0.0,
    style_share: float = 0.5,
) -> list[str]:
    generator = np.random.default_rng(3)
    return [
        caption(label, style, generator, empty=empty, unknown=unknown, style_share=style_share) for _ in range(count)
    ]


def test_the_same_seed_gives_the_same_captions() -> None:
    first, second = (captions(4, (1, 0, -1), empty=0.12, unknown=0.06) for _ in range(2))
    assert first == second
    assert len(set(first)) > 50


@pytest.mark.parametrize("style", [(0, 0, 0), (1, 0, 0), (-1, 1, 0), (0, -1, 1), (1, 1, -1)])
def test_captions_name_the_digit_and_the_measured_style_only(style: tuple[int, int, int]) -> None:
    for label in (1, 8):
        texts = captions(label, style)
        used = {word for text in texts for word in text.split()}
        assert used <= set(KNOWN_WORDS)
        for end, pair in zip(style, STYLE_PAIRS):
            assert used & set(pair) == ({pair[end > 0]} if end else set())
        for text in texts:
            names = {word for word in text.split() if word in DIGIT_WORDS or word.isdigit()}
            assert names in ({str(label)}, {DIGIT_WORDS[label]})
            assert ("slanted" in text) == bool(re.search("left|right", text))


def test_shares_of_empty_captions_and_style_words() -> None:
    count = 4000
    texts = captions(3, (1, 0, 0), count, empty=0.12, style_share=0.5)
    empty = texts.count("") / count
    styled = sum("thick" in text for text in texts) / count
    # Four standard deviations of a share of 4,000.
    assert empty == pytest.approx(0.12, abs=4 * (0.12 * 0.88 / count) ** 0.5)
    assert styled == pytest.approx(0.88 / 2, abs=4 * (0.44 * 0.56 / count) ** 0.5)


def test_unknown_words_accompany_or_replace_the_known_words() -> None:
    texts = captions(7, (0, 0, 0), 2000, unknown=0.5)
    unknown = [set(re.findall(r"\w+", text)) - set(KNOWN_WORDS) for text in texts]
    named = ["7" in text or "seven" in text for text in texts]
    # A quarter of 2,000 each, less four standard deviations.
    least = 500 - 4 * (2000 * 0.25 * 0.75) ** 0.5
    assert sum(bool(words) and name for words, name in zip(unknown, named)) > least
    assert sum(bool(words) and not name for words, name in zip(unknown, named)) > least


def test_an_precedes_a_vowel() -> None:
    texts = captions(8, (0, 0, 0))
    assert any(text.startswith("an eight") for text in texts)
    assert not any(text.startswith("a eight") for text in texts)
