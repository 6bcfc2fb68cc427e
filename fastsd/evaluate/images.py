"""The images and captions that a model is measured on: a folder of images, or MNIST."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from fastsd.errors import FastsdError
from fastsd.files import reason
from fastsd.image.files import open_image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_METADATA = 2**28  # bytes of metadata.jsonl
BATCH = 32  # images that a network sees at a time
MAX_CAPTION = 2**16  # bytes of a .txt file
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
    one), or in a .txt file beside each image. MNIST's folder is read too; its test images then are enlarged as in
    training.

    Raises:
        FastsdError: no such folder, no images, no captions, a line of metadata.jsonl that is none.
    """
    if not folder.is_dir():
        raise FastsdError("no such folder", argument=argument, path=folder)
    if (folder / IDX).is_file():
        images = _read_mnist(folder)
    elif (folder / "metadata.jsonl").is_file():
        images = _read_metadata(folder, argument)
    else:
        images = _read_texts(folder, argument)
    if not images:
        raise FastsdError("holds no images", argument=argument, path=folder)
    sha = hashlib.sha256()
    for one in images:
        sha.update(json.dumps([one.name, one.captions, one.label]).encode())
    return RealImages(folder, tuple(images), sha.hexdigest())


def _read_metadata(folder: Path, argument: str) -> list[RealImage]:
    path = folder / "metadata.jsonl"
    try:
        if path.stat().st_size > MAX_METADATA:
            raise FastsdError(f"has more than {MAX_METADATA} bytes", argument=argument, path=path)
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = reason(error) if isinstance(error, OSError) else "is not UTF-8"
        raise FastsdError(why, argument=argument, path=path) from error
    images = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            images.append(_from_row(folder, line, f"line {number}", argument))
    return images


def _from_row(folder: Path, line: str, where: str, argument: str) -> RealImage:
    path = folder / "metadata.jsonl"
    try:
        row: Any = json.loads(line)
        name, text = row["file_name"], row["text"]
        captions = [text] if isinstance(text, str) else list(text)
        label = row.get("label")
        kind = str(row.get("held_out", ""))
        right = isinstance(name, str) and captions and all(isinstance(caption, str) for caption in captions)
        if not right or not (label is None or (isinstance(label, int) and 0 <= label < 2**31)):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FastsdError(
            f'{where} should have "file_name" and "text", a caption or a list of them', argument=argument, path=path
        ) from error
    file = folder / name
    if not file.resolve().is_relative_to(folder.resolve()):
        raise FastsdError(f"{where} names a file outside of the folder", argument=argument, path=path)
    if not file.is_file():
        raise FastsdError(f"{where} names {name!r}, which is not there", argument=argument, path=path)
    return RealImage(name, tuple(captions), lambda: open_image(file, argument), label, kind)


def _read_texts(folder: Path, argument: str) -> list[RealImage]:
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    images = []
    for file in files:
        text = file.with_suffix(".txt")
        if not text.is_file():
            raise FastsdError(
                f"{file.name} has no caption; metadata.jsonl or {text.name} would hold it",
                argument=argument,
                path=folder,
            )
        if text.stat().st_size > MAX_CAPTION:
            raise FastsdError(f"has more than {MAX_CAPTION} bytes", argument=argument, path=text)
        caption = text.read_text(encoding="utf-8", errors="replace").strip()
        images.append(RealImage(str(file.relative_to(folder)), (caption,), _opener(file, argument)))
    return images


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
