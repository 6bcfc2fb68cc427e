"""Captions for the digits: what a user might type, with style words that were measured on the picture."""

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
    empty: float = 0.12,
    unknown: float = 0.06,
    style_share: float = 0.5,
) -> str:
    """A caption for one picture, drawn at random.

    Args:
        label: the digit.
        style: thickness, slant and size: -1 (low end), 0 (say nothing) or 1 (high end), as `strokes.styles` gives them.
        generator: the only source of chance.
        empty: share of empty captions, which classifier-free guidance needs (Ho and Salimans 2022).
        unknown: share of captions with made-up words among the others or instead of them, so that a word that the
            model does not know changes little.
        style_share: how often each style word that is true is said.
    """
    kind = generator.random()
    if kind < empty:
        return ""
    if kind < empty + unknown / 2:
        return " ".join(_nonsense(generator) for _ in range(generator.integers(1, 4)))
    said = [end if generator.random() < style_share else 0 for end in style]
    words = _describe(label, said, generator)
    if kind < empty + unknown:
        for _ in range(generator.integers(1, 3)):
            words.insert(int(generator.integers(len(words) + 1)), _nonsense(generator))
    return " ".join(words)


def _describe(label: int, said: list[int], generator: np.random.Generator) -> list[str]:
    """For example ["a", "small", "thin", "handwritten", "8", "slanted", "left"]."""
    thickness, slant, size = said
    adjectives = [pair[end > 0] for pair, end in zip(_ADJECTIVES, (thickness, size)) if end]
    if len(adjectives) == 2 and generator.random() < 0.5:
        adjectives.reverse()
    if generator.random() < 0.35:
        adjectives.append("handwritten")
    name = str(label) if generator.random() < 0.5 else DIGIT_WORDS[label]
    leaning = _SLANTS[slant > 0].split() if slant else []
    form = generator.random()
    if leaning and form < 0.3:
        adjectives, leaning = [*leaning, *adjectives], []
    if form > 0.85:
        return ["the", *adjectives, "digit" if generator.random() < 0.5 else "number", name, *leaning]
    if form > 0.5:
        first = adjectives[0] if adjectives else DIGIT_WORDS[label]
        return ["an" if first == "eight" else "a", *adjectives, name, *leaning]
    return [*adjectives, name, *leaning]


def _nonsense(generator: np.random.Generator) -> str:
    """A word of two to eight random letters, sometimes with a comma or full stop."""
    letters = generator.choice(list(string.ascii_lowercase), size=generator.integers(2, 9))
    mark = generator.choice(["", "", "", ",", "."])
    return "".join(letters) + str(mark)
