"""Image files with captions as training images: checked once, sized into buckets, augmented."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps

from fastsd.errors import FastsdError
from fastsd.image.files import open_image, open_mask
from fastsd.train import vocabulary
from fastsd.train.images import Notes, Rows, TrainingImages
from fastsd.train.settings import Augment, Data
from fastsd.train.sources import Sample

NAMED = 5  # of the images that cannot be read, in a message
FEW_WORDS = 500  # a model of at most so many words names them to its user
MASK_SIDE = 64  # of the masks that are kept with the latents
MARGIN = 1.25  # a cropped image is kept this much larger than what is cut from it


class CaptionedImages(TrainingImages):
    """Images with captions.

    Every image is decoded once at the start, so that a damaged one is known before training. They stay in memory,
    resized, as far as `data.memory_gb` allows; the others are decoded each time.

    Attributes:
        samples: those that can be read. bad: name and reason of the others.
        sizes: height and width of each image's bucket; originals: of the image itself.
    """

    def __init__(self, samples: list[Sample], data: Data, multiple: int, report: Callable[[str], None]):
        """Args:
        multiple: sides are multiples of it, that of the autoencoder.
        report: takes a line about images that are left out.

        Raises:
            FastsdError: more than `data.max_bad` images cannot be read.
        """
        self.data, self.augment = data, data.augment
        samples = samples[: data.limit or None]
        self.buckets = make_buckets(data.resolution, data.bucket_step or multiple) if data.buckets else None
        if data.resolution % multiple:
            raise FastsdError(f"data.resolution is {data.resolution}; it should be a multiple of {multiple}")
        if data.masks and data.augment.rotation:
            raise FastsdError("data.augment.rotation does not turn masks; leave out data.masks or the rotation")
        self.side = (data.resolution, data.resolution)
        self._memory = int(data.memory_gb * 2**30)
        self._kept: dict[int, np.ndarray] = {}
        self._check(samples, report)
        self.texts = [caption for sample in self.samples for caption in sample.captions]
        words = sorted({word for text in self.texts for word in re.findall(r"[a-z]+", text.lower())})
        self.known_words = tuple(words) if len(words) <= FEW_WORDS else ()

    def _check(self, samples: list[Sample], report: Callable[[str], None]) -> None:
        """Decode every image; keep what can be read."""

        def decode(sample: Sample) -> tuple[Sample, tuple[int, int], np.ndarray | None, str, bytes]:
            try:
                data = sample.read()
                size, pixels, original = self._decode(data)
            except FastsdError as error:
                return sample, (0, 0), None, error.message, b""
            self._originals[sample.name] = original
            return sample, size, pixels, "", hashlib.sha256(data).digest()

        self.samples: list[Sample] = []
        self.sizes: list[tuple[int, int]] = []
        self._originals: dict[str, tuple[int, int]] = {}
        self.bad: list[tuple[str, str]] = []
        digest, used = hashlib.sha256(), 0
        with ThreadPoolExecutor() as pool:
            for sample, size, pixels, why, content in pool.map(decode, samples):
                if pixels is None:
                    self.bad.append((sample.name, why))
                    self._check_bad(len(samples))
                    continue
                used += pixels.nbytes
                if used <= self._memory:
                    self._kept[len(self.samples)] = pixels
                self.samples.append(sample)
                self.sizes.append(size)
                digest.update(content + "\n".join(sample.captions).encode())
        self._digest = digest.hexdigest()
        self.originals = [self._originals[sample.name] for sample in self.samples]
        if self.bad:
            report(f"{len(self.bad)} of {len(samples)} images left out: {self._bad_names()}")
        bare = [sample.name for sample in self.samples if not sample.captions]
        if bare:
            report(f"{len(bare)} images have no caption and are trained without one, such as {bare[0]}")

    def _check_bad(self, total: int) -> None:
        allowed = self.data.max_bad if self.data.max_bad >= 1 else self.data.max_bad * total
        if len(self.bad) > allowed:
            raise FastsdError(
                f"more than {allowed:g} images cannot be read: {self._bad_names()};"
                " mend or remove them, or allow more with --max-bad",
                path=self.data.path,
            )
        if len(self.bad) == total:
            raise FastsdError(f"no image can be read: {self._bad_names()}", path=self.data.path)

    def _bad_names(self) -> str:
        shown = [f"{name} ({why})" for name, why in self.bad[:NAMED]]
        return ", ".join(shown) + (f" and {len(self.bad) - NAMED} more" if len(self.bad) > NAMED else "")

    def _decode(self, data: bytes) -> tuple[tuple[int, int], np.ndarray, tuple[int, int]]:
        """The size of an image's bucket; its pixels, resized to cover that, with a margin for random crops; and the
        image's own size, height first."""
        image = open_image(data, argument=None)
        height, width = self.side
        if self.buckets:
            height, width = nearest_bucket(self.buckets, image.height / image.width)
        size = self._covering((image.height, image.width), (height, width))
        resized = image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)
        return (height, width), np.asarray(resized), (image.height, image.width)

    def _covering(self, original: tuple[int, int], bucket: tuple[int, int]) -> tuple[int, int]:
        """Width and height of an image resized to cover its bucket; the arguments have the height first."""
        margin = MARGIN if self.augment.crop else 1.0
        scale = max(side * margin / own for side, own in zip(bucket, original))
        return max(round(original[1] * scale), bucket[1]), max(round(original[0] * scale), bucket[0])

    def __len__(self) -> int:
        return len(self.samples)

    def size_of(self, row: int) -> tuple[int, int]:
        return self.sizes[row]

    def groups(self) -> list[Rows]:
        by_size: dict[tuple[int, int], list[int]] = {}
        for row, size in enumerate(self.sizes):
            by_size.setdefault(size, []).append(row)
        return [np.array(by_size[size], dtype=np.int64) for size in sorted(by_size)]

    def pixels(self, rows: Rows, random: np.random.Generator, notes: bool = False) -> tuple[torch.Tensor, Notes]:
        images, corners, flips = zip(*(self._augmented(int(row), random) for row in rows))
        taken: Notes = {}
        if notes:  # heights first: what SDXL's UNet is told of an image
            taken["original_size"] = torch.tensor(
                [self.originals[int(row)] for row in rows], dtype=torch.int64, device="cpu"
            )
            taken["crop"] = torch.tensor(corners, dtype=torch.int64, device="cpu")
            if self.data.masks:
                masks = [self._mask(int(row), *place) for row, *place in zip(rows, corners, flips)]
                taken["mask"] = torch.from_numpy(np.stack(masks))
        return torch.from_numpy(np.stack(images)).float() / 127.5 - 1, taken

    def _mask(self, row: int, corner: tuple[int, int], flipped: bool) -> np.ndarray:
        """The mask of an image, cut as the image is: `[MASK_SIDE, MASK_SIDE]` uint8, 255 where the image counts."""
        file = Path(self.data.masks) / f"{Path(self.samples[row].name).with_suffix('')}.png"
        if not file.is_file():
            raise FastsdError(f"no such file; {self.samples[row].name} needs a mask of that name", path=file)
        original, (height, width) = self.originals[row], self.sizes[row]
        mask = open_mask(file, argument=None).resize(self._covering(original, (height, width)), Image.Resampling.BOX)
        left, top = corner[1], corner[0]
        if flipped:
            mask, left = ImageOps.mirror(mask), corner[1]
        cut = mask.crop((left, top, left + width, top + height))
        return np.asarray(cut.resize((MASK_SIDE, MASK_SIDE), Image.Resampling.BOX))

    def _augmented(self, row: int, random: np.random.Generator) -> tuple[np.ndarray, tuple[int, int], bool]:
        """The pixels of an image, the upper left corner of what is cut from the resized one, and whether it is
        flipped; the corner is then that of the flipped one."""
        pixels = self._kept[row] if row in self._kept else self._decode(self.samples[row].read())[1]
        height, width = self.sizes[row]
        settings = self.augment
        if settings.rotation or settings.colour:
            pixels = np.asarray(_disturbed(Image.fromarray(pixels), settings, random))
        spare = pixels.shape[0] - height, pixels.shape[1] - width
        top, left = (int(random.integers(n + 1)) if settings.crop else n // 2 for n in spare)
        pixels = pixels[top : top + height, left : left + width]
        if settings.flip and random.random() < 0.5:
            return pixels[:, ::-1], (top, spare[1] - left), True
        return pixels, (top, left), False

    def caption(self, row: int, notes: Notes, random: np.random.Generator, empty: float) -> str:
        captions = self.samples[row % len(self.samples)].captions
        if random.random() < empty or not captions:
            return ""
        return captions[random.integers(len(captions))]

    def vocabulary(self) -> tuple[vocabulary.Vocab, vocabulary.Merges]:
        return vocabulary.learn(self.texts, self.data.vocabulary)

    def record(self) -> dict[str, Any]:
        return {
            "images": len(self),
            "left_out": [list(bad) for bad in self.bad],
            "buckets": {f"{h}x{w}": self.sizes.count((h, w)) for h, w in sorted(set(self.sizes))},
            "augmentation": asdict(self.augment),
        }

    def fingerprint(self) -> str:
        return self._digest


def _disturbed(image: Image.Image, settings: Augment, random: np.random.Generator) -> Image.Image:
    """Rotated by up to `rotation` degrees (the corners repeat the border's mean colour), colours changed."""
    if settings.rotation:
        border = np.asarray(image)
        edge = np.concatenate([border[0], border[-1], border[:, 0], border[:, -1]]).mean(0)
        fill = (round(edge[0]), round(edge[1]), round(edge[2]))
        angle = random.uniform(-settings.rotation, settings.rotation)
        image = image.rotate(angle, Image.Resampling.BICUBIC, fillcolor=fill)
    if settings.colour:
        for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            image = change(image).enhance(random.uniform(1 - settings.colour, 1 + settings.colour))
    return image


def make_buckets(resolution: int, step: int) -> list[tuple[int, int]]:
    """Heights and widths, multiples of `step`, of at most resolution^2 pixels, from 1:2 to 2:1 (NovelAI 2022)."""
    found = {(resolution // step * step,) * 2}
    for short in range(step, resolution + 1, step):
        long = min(resolution**2 // short // step * step, 2 * short)
        if long >= resolution:
            found |= {(short, long), (long, short)}
    return sorted(found)  # type: ignore[arg-type]


def nearest_bucket(buckets: list[tuple[int, int]], ratio: float) -> tuple[int, int]:
    """The bucket whose ratio of height to width is nearest, by the logarithm."""
    return min(buckets, key=lambda size: abs(np.log(size[0] / size[1] / ratio)))
