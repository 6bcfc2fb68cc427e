"""Captions for the digits: prompts that a user might type, with style words that match the measured strokes."""

from __future__ import annotations

import string

import numpy as np

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDS = [
    *DIGIT_WORDS,
    *("a", "an", "the", "digit", "number", "handwritten"),
    *("thin", "thick", "small", "large", "slanted", "left", "right"),
]
KNOWN_WORDS = [*WORDS, *string.digits]  # single digits are tokens of every CLIP vocabulary

_ADJECTIVES = (("thin", "thick"), ("small", "large"))
_SLANTS = ("slanted left", "slanted right")


def caption(
    label: int,
    style: tuple[int, int, int],
    generator: np.random.Generator,
    *,
    empty: float,
    unknown: float,
    style_share: float,
) -> str:
    """A random caption for one image.

    Args:
        label: the digit.
        style: thickness, slant and size: -1 (low end), 0 (no word) or 1 (high end), from `strokes.styles`.
        generator: the only source of randomness.
        empty: share of empty captions, which classifier-free guidance needs (Ho and Salimans 2022).
        unknown: share of captions with made-up words, in addition to the true words or instead of them. They teach the
            model to ignore words that it does not know.
        style_share: the probability that a style word that applies is in the caption.
    """
    kind = generator.random()
    if kind < empty:
        return ""
    if kind < empty + unknown / 2:
        return " ".join(_made_up_word(generator) for _ in range(generator.integers(1, 4)))
    named = [end if generator.random() < style_share else 0 for end in style]
    words = _describe(label, named, generator)
    if kind < empty + unknown:
        for _ in range(generator.integers(1, 3)):
            words.insert(int(generator.integers(len(words) + 1)), _made_up_word(generator))
    return " ".join(words)


def _describe(label: int, style: list[int], generator: np.random.Generator) -> list[str]:
    """For example ["a", "small", "thin", "handwritten", "8", "slanted", "left"]."""
    thickness, slant, size = style
    adjectives = [pair[end > 0] for pair, end in zip(_ADJECTIVES, (thickness, size)) if end]
    if len(adjectives) == 2 and generator.random() < 0.5:
        adjectives.reverse()
    if generator.random() < 0.35:
        adjectives.append("handwritten")
    name = str(label) if generator.random() < 0.5 else DIGIT_WORDS[label]
    slant_words = _SLANTS[slant > 0].split() if slant else []
    form = generator.random()
    if slant_words and form < 0.3:
        adjectives, slant_words = [*slant_words, *adjectives], []
    if form > 0.85:
        return ["the", *adjectives, "digit" if generator.random() < 0.5 else "number", name, *slant_words]
    if form > 0.5:
        first = adjectives[0] if adjectives else DIGIT_WORDS[label]
        return ["an" if first == "eight" else "a", *adjectives, name, *slant_words]
    return [*adjectives, name, *slant_words]


def _made_up_word(generator: np.random.Generator) -> str:
    """Two to eight random letters, sometimes followed by a comma or a full stop."""
    letters = generator.choice(list(string.ascii_lowercase), size=generator.integers(2, 9))
    mark = generator.choice(["", "", "", ",", "."])
    return "".join(letters) + str(mark)
