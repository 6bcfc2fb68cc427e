"""The images and captions that a model is measured on: a folder of images, or MNIST."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from fastsd.errors import FastsdError, about
from fastsd.image.files import open_image
from fastsd.train.sources import METADATA, Entry, entries

BATCH = 32  # images that a network sees at a time
IDX = "train-images-idx3-ubyte.gz"
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class RealImage:
    """One image: how to open it, its captions, its class where it has one, and the name that stands for it."""

    name: str
    captions: tuple[str, ...]
    open: Callable[[], Image.Image]
    label: int | None = None
    kind: str = ""  # "parts" or "order" of what was held out


@dataclass(frozen=True)
class RealImages:
    """The images of a folder, in the order of their names, and a hash of names and captions."""

    folder: Path
    images: tuple[RealImage, ...]
    sha256: str

    def __len__(self) -> int:
        return len(self.images)

    def pixels(self, which: range, size: tuple[int, int]) -> Iterator[Pixels]:
        """Images as `[height, width, 3]` at `size` (width, height): the middle of each, made smaller or larger."""
        for index in which:
            yield fit(self.images[index].open(), size)


def batches(images: Iterable[Pixels]) -> Iterator[list[Pixels]]:
    """Lists of `BATCH` images; the last may be shorter."""
    rest = iter(images)
    while part := list(islice(rest, BATCH)):
        yield part


def fit(image: Image.Image, size: tuple[int, int]) -> Pixels:
    """The largest middle part of an image in the shape of `size`, resampled to it (bicubic, antialiased)."""
    if image.size != size:
        image = ImageOps.fit(image, size, Image.Resampling.BICUBIC)
    return np.asarray(image.convert("RGB"))


def read_images(folder: Path, argument: str = "--data") -> RealImages:
    """The images of a folder with their captions.

    Captions are in `metadata.jsonl` ("file_name" and "text", a text or a list; "label", a whole number, where there is
    one), or in a .txt file beside each image, one a line, as in training (`fastsd.train.sources`). MNIST's folder is
    read too; its test images then are enlarged as in training.

    Raises:
        FastsdError: no such folder, no images, no captions, a line of metadata.jsonl that is none.
    """
    with about(argument):
        mnist = (folder / IDX).is_file()
        images = _read_mnist(folder) if mnist else [_real(entry, folder, argument) for entry in entries(folder)]
        if not images:
            raise FastsdError("holds no images", path=folder)
    sha = hashlib.sha256()
    for one in images:
        sha.update(json.dumps([one.name, one.captions, one.label]).encode())
    return RealImages(folder, tuple(images), sha.hexdigest())


def _real(entry: Entry, folder: Path, argument: str) -> RealImage:
    path = folder / METADATA if entry.row else folder
    label, kind = entry.row.get("label"), str(entry.row.get("held_out", ""))
    if not entry.captions:
        text = entry.file.with_suffix(".txt").name
        raise FastsdError(f"{entry.where} has no caption; {METADATA} or {text} would hold it", path=path)
    if not (label is None or (isinstance(label, int) and 0 <= label < 2**31)):
        raise FastsdError(f'{entry.where}: "label" should be a whole number from 0 on', path=path)
    if not entry.file.is_file():
        raise FastsdError(f"{entry.where} names {entry.name!r}, which is not there", path=path)
    return RealImage(entry.name, entry.captions, _opener(entry.file, argument), label, kind)


def _opener(file: Path, argument: str) -> Callable[[], Image.Image]:
    return lambda: open_image(file, argument)


def _read_mnist(folder: Path) -> list[RealImage]:
    from fastsd.evaluate.digits.report import augmented
    from fastsd.train.captions import DIGIT_WORDS
    from fastsd.train.digits import read_digits

    grey, labels = augmented(read_digits(folder, "t10k"), 10_000)
    array = (grey * 255).round().numpy().astype(np.uint8)

    def opener(index: int) -> Callable[[], Image.Image]:
        return lambda: Image.fromarray(array[index]).convert("RGB")

    return [
        RealImage(f"t10k-{i:05}", (f"a handwritten {DIGIT_WORDS[label]}",), opener(i), int(label))
        for i, label in enumerate(labels)
    ]
