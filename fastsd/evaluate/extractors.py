"""What turns images into the features that they are compared in. The report names it, with the hash of its weights.

| name | features |
|---|---|
| pixels | 16 x 16 x 3 means of the image: needs no weights, sees colour and layout alone |
| inception:FILE | the 2048 features of Inception v3 of 2015, on which FID is defined |
| reader:FILE | the digit reader's features before its last layer; its classes are the digits |
| clip:FOLDER | a CLIP model's image vectors, before they are normalised |
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from fastsd.errors import FastsdError, about, nearest
from fastsd.evaluate.clip import load_clip, weights_of
from fastsd.evaluate.digits.reader import load_reader, to_input
from fastsd.evaluate.images import Pixels, batches
from fastsd.evaluate.inception import load_inception

PIXELS_SIDE = 16

# Of images `[N, H, W, 3]` uint8: features `[N, D]`, and logits `[N, K]` where the extractor has classes.
Look = Callable[[torch.Tensor], tuple[torch.Tensor, "torch.Tensor | None"]]


@dataclass(frozen=True)
class Extractor:
    """A way to look at images.

    Attributes:
        name: "inception".
        sha256: of the file of its weights, or of nothing.
        classes: what its logits mean, or none.
    """

    name: str
    sha256: str
    look: Look
    classes: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """ "inception (sha256 6726825d...)": two figures are comparable where this is the same."""
        return f"{self.name} (sha256 {self.sha256[:12]})" if self.sha256 else self.name

    @torch.inference_mode()
    def features(self, images: Iterable[Pixels]) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
        """Features `[N, D]`, and probabilities `[N, K]` of the classes or None, both float64."""
        found, classes = [], []
        for part in batches(images):
            features, logits = self.look(torch.from_numpy(np.stack(part)))
            found.append(features.double().numpy())
            if logits is not None:
                classes.append(logits.double().softmax(1).numpy())
        return np.concatenate(found), np.concatenate(classes) if classes else None


def as_channels(images: torch.Tensor) -> torch.Tensor:
    """`[N, H, W, 3]` uint8 to `[N, 3, H, W]` in [0, 1]."""
    return images.permute(0, 3, 1, 2).float() / 255


def load_extractor(spec: str, argument: str = "--extractor") -> Extractor:
    """The extractor that "NAME" or "NAME:FILE" names.

    Raises:
        FastsdError: an unknown name, a missing file, weights of another network.
    """
    name, _, file = spec.partition(":")
    if name not in EXTRACTORS:
        known = ", ".join(EXTRACTORS)
        raise FastsdError(f"{name!r} is none of {known}{nearest(name, EXTRACTORS)}", argument=argument)
    if name == "pixels":
        if file:
            raise FastsdError("pixels takes no file", argument=argument, value=spec)
        return Extractor("pixels", "", _look_at_pixels)
    if not file:
        raise FastsdError(f"it needs the file of its weights, {name}:FILE", argument=argument, value=spec)
    path = Path(file).expanduser()
    if not (path.is_dir() if name == "clip" else path.is_file()):
        raise FastsdError("no such folder" if name == "clip" else "no such file", argument=argument, path=path)
    with about(argument, path):
        return EXTRACTORS[name](path)


def _look_at_pixels(images: torch.Tensor) -> tuple[torch.Tensor, None]:
    return F.interpolate(as_channels(images), size=PIXELS_SIDE, mode="area").flatten(1), None


def _inception(path: Path) -> Extractor:
    network = load_inception(path)
    return Extractor("inception", file_sha256(path), lambda images: network(as_channels(images)))


def _reader(path: Path) -> Extractor:
    from fastsd.train.captions import DIGIT_WORDS

    reader = load_reader(path)

    def look(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = reader.features(to_input(as_channels(images).mean(1)))
        return features, reader.out(features)

    return Extractor("reader", file_sha256(path), look, DIGIT_WORDS)


def _clip(path: Path) -> Extractor:
    model = load_clip(path)
    return Extractor("clip", file_sha256(weights_of(path)), lambda images: (model.look(images), None))


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal, read part by part."""
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2**20):
            sha.update(part)
    return sha.hexdigest()


EXTRACTORS: dict[str, Callable[[Path], Extractor]] = {
    "pixels": lambda path: Extractor("pixels", "", _look_at_pixels),
    "inception": _inception,
    "reader": _reader,
    "clip": _clip,
}
