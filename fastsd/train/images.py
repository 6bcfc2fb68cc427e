"""Training images with captions, by row: what every kind of data is to the stages, and the order in which they come."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastsd.errors import FastsdError
from fastsd.train.parts import Part
from fastsd.train.vocabulary import Merges, Vocab

Rows = NDArray[np.int64]
Notes = dict[str, torch.Tensor]  # what is known of each image beside its pixels, `[N, ...]` each
HOLD_OUT = 1  # keys the random choice of what is held out, apart from that of an epoch's order


class TrainingImages(ABC):
    """A set of images.

    Attributes:
        side: of the images that the stages see, in pixels: height and width. With buckets, of the square one.
        known_words: all words of the captions, where they are few enough to be named to a user; else empty.
    """

    side: tuple[int, int]
    known_words: tuple[str, ...] = ()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def pixels(self, rows: Rows, random: np.random.Generator, notes: bool = False) -> tuple[torch.Tensor, Notes]:
        """The images `rows`, all of one group, augmented: `[n, H, W, 3]` fp32 in [-1, 1]; with `notes`, what is known
        of them."""

    @abstractmethod
    def caption(self, row: int, notes: Notes, random: np.random.Generator, empty: float) -> str:
        """A caption of image `row` of the set to which `notes` belong; with the probability `empty`, none."""

    @abstractmethod
    def vocabulary(self) -> tuple[Vocab, Merges]:
        """Vocabulary and merges of a new text encoder's tokenizer."""

    def size_of(self, row: int) -> tuple[int, int]:
        """Height and width of image `row`, as the stages see it."""
        return self.side

    def groups(self) -> list[Rows]:
        """The rows by the size of their images: a batch has images of one size."""
        return [np.arange(len(self))]

    def complete(self, notes: Notes) -> Notes:
        """The notes of the whole set, which may compare its images. `notes` holds those of `passes` augmentations of
        every image, one augmentation after another."""
        return notes

    def record(self) -> dict[str, Any]:
        """What the run's record says of the data."""
        return {"images": len(self)}

    def fingerprint(self) -> str:
        """A text that differs where the data do."""
        return str(len(self))


class RowOrder:
    """Which rows a part of a step's batch has. It follows from the seed and the step, so a resumed run continues inside
    of the epoch.

    Without replacement, every row comes once in an epoch, in an order that is new in each. With several groups, a batch
    is of one group; the last batch of a group is filled up from its beginning.
    """

    def __init__(
        self, groups: list[Rows], seed: int, held_out: float = 0.0, replacement: bool = False, passes: int = 1
    ):
        """Args:
        held_out: share of the images of each group that only the validation sees.
        passes: the rows are those of so many copies of the set, one after another.
        """
        self.seed, self.replacement = seed, replacement
        total = sum(len(group) for group in groups)
        copies = np.arange(passes)[:, None] * total
        self.training: list[Rows] = []
        self.validation: list[Rows] = []
        for group in groups:
            kept = len(group)
            if held_out and kept > 1:  # at least one for each
                kept -= min(max(round(held_out * kept), 1), kept - 1)
            shuffled = np.random.default_rng([seed, HOLD_OUT]).permutation(group) if kept < len(group) else group
            self.training.append((copies + np.sort(shuffled[:kept])).ravel())
            self.validation.append(np.sort(shuffled[kept:]))
        self.count = sum(len(group) for group in self.training)

    def rows(self, part: Part) -> Rows:
        """The rows of a part; of the validation, the same in every call."""
        if part.validation:
            group = max(self.validation, key=len)
            if not len(group):
                raise FastsdError("no image is left for the validation; it needs fit.validate_share and more images")
            return group[np.arange(part.first, part.first + part.size) % len(group)]
        if len(self.training) == 1:
            (group,) = self.training
            if self.replacement:
                return group[part.random.numpy.integers(len(group), size=part.size)]
            positions = np.arange(part.size) + part.step * part.of + part.first
            epochs, places = np.divmod(positions, len(group))
            return np.array([group[_order(self.seed, len(group), int(e))[p]] for e, p in zip(epochs, places)], np.int64)
        batches = sum(-(-len(group) // part.of) for group in self.training)
        epoch, number = divmod(part.step, batches)
        return self._batches(epoch, part.of)[number][part.first : part.first + part.size]

    def _batches(self, epoch: int, size: int) -> list[Rows]:
        """An epoch's batches over all groups, in random order."""
        batches = []
        for index, group in enumerate(self.training):
            shuffled = np.random.default_rng([self.seed, epoch, index]).permutation(group)
            for first in range(0, len(shuffled), size):
                batch = shuffled[first : first + size]
                batches.append(np.concatenate([batch, np.resize(shuffled, size - len(batch))]))
        order = np.random.default_rng([self.seed, epoch, len(self.training)]).permutation(len(batches))
        return [batches[i] for i in order]


@lru_cache(maxsize=4)
def _order(seed: int, count: int, epoch: int) -> Rows:
    return np.random.default_rng([seed, epoch, count]).permutation(count)
