"""MNIST as training images: enlarged, scaled and sheared at random, with captions that match the measured strokes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fastsd.errors import FastsdError
from fastsd.train import vocabulary
from fastsd.train.captions import KNOWN_WORDS, WORDS, caption
from fastsd.train.digits import IMAGE_SIDE, STYLES, augment, read_digits, to_rgb
from fastsd.train.images import Notes, Rows, TrainingImages
from fastsd.train.settings import Data
from fastsd.train.strokes import Strokes, measure, styles

_MEASURES = ("width", "slant", "size")


class DigitImages(TrainingImages):
    """The digits of the bundled model."""

    side = (IMAGE_SIDE, IMAGE_SIDE)
    known_words = tuple(KNOWN_WORDS)

    def __init__(self, data: Data):
        """Read the IDX files in `data.path`.

        Raises:
            FastsdError: a file is missing or damaged.
        """
        if data.digits.style not in STYLES:
            known = ", ".join(name for name in STYLES if name)
            raise FastsdError(f"it should be {known}, or empty", argument="data.digits.style", value=data.digits.style)
        digits = read_digits(data.path)
        count = data.limit or len(digits.images)
        self.images, self.labels, self.settings = digits.images[:count], digits.labels[:count], data.digits
        self.passes = data.passes
        if not len(self.images):
            raise FastsdError("no images", path=data.path)

    def __len__(self) -> int:
        return len(self.images)

    def pixels(self, rows: Rows, random: np.random.Generator, notes: bool = False) -> tuple[torch.Tensor, Notes]:
        images = STYLES[self.settings.style](
            augment(self.images[rows], random, self.settings.scales, self.settings.shear)
        )
        measured: Notes = {}
        if notes:
            strokes = measure(images.numpy())
            measured = {name: torch.from_numpy(getattr(strokes, name)) for name in _MEASURES}
        return to_rgb(images), measured

    def complete(self, notes: Notes) -> Notes:
        """`labels` `[N]` uint8, and `styles` `[N, 3]` int8 (see `strokes.styles`), which compare images of a digit."""
        labels = np.tile(self.labels, self.passes)
        strokes = Strokes(*(notes[name].numpy() for name in _MEASURES))
        ends = styles(strokes, labels, self.settings.style_share)
        return {"labels": torch.from_numpy(labels), "styles": torch.from_numpy(ends)}

    def caption(self, row: int, notes: Notes, random: np.random.Generator, empty: float) -> str:
        thickness, slant, size = (int(end) for end in notes["styles"][row])
        return caption(
            int(notes["labels"][row]),
            (thickness, slant, size),
            random,
            empty=empty,
            unknown=self.settings.unknown,
            style_share=self.settings.style_word_share,
        )

    def vocabulary(self) -> tuple[vocabulary.Vocab, vocabulary.Merges]:
        return vocabulary.build(WORDS)

    def record(self) -> dict[str, Any]:
        return {"images": len(self), "augmentation": {"scales": self.settings.scales, "shear": self.settings.shear}}
