"""Training images with captions, by row: what every kind of data is to the stages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastsd.train.parts import Part

Rows = NDArray[np.int64]
Notes = dict[str, torch.Tensor]  # what is known of each image beside its pixels, `[N, ...]` each


class TrainingImages(ABC):
    """A set of images.

    Attributes:
        side: of the images that the stages see, in pixels: height and width.
        known_words: all words of the captions, where they are few; else empty.
    """

    side: tuple[int, int]
    known_words: tuple[str, ...] = ()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def pixels(self, rows: Rows, random: np.random.Generator, notes: bool = False) -> tuple[torch.Tensor, Notes]:
        """The images `rows`, augmented: `[n, H, W, 3]` fp32 in [-1, 1]; with `notes`, what is known of them."""

    def complete(self, notes: Notes) -> Notes:
        """The notes of the whole set, which may compare its images. `notes` holds those of `passes` augmentations of
        every image, one augmentation after another."""
        return notes

    @abstractmethod
    def caption(self, row: int, notes: Notes, random: np.random.Generator, empty: float) -> str:
        """A caption of image `row` of the set to which `notes` belong; with the probability `empty`, none."""

    def record(self) -> dict[str, Any]:
        """What the run's record says of the data."""
        return {"images": len(self)}


def rows_with_replacement(count: int, part: Part) -> Rows:
    """The samples of a part, each drawn from all `count` rows."""
    return part.random.numpy.integers(count, size=part.size)


def rows_in_epochs(count: int, part: Part, seed: int) -> Rows:
    """The samples of a part, where every row comes once in each epoch, in an order that is new in each.

    The position in the data follows from the step, so a resumed run continues inside of the epoch.
    """
    first = part.step * part.of + part.first
    positions = np.arange(first, first + part.size)
    return np.array([_order(seed, count, int(p // count))[p % count] for p in positions], dtype=np.int64)


@lru_cache(maxsize=4)
def _order(seed: int, count: int, epoch: int) -> Rows:
    return np.random.default_rng([seed, epoch, count]).permutation(count)
