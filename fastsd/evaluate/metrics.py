"""The metrics of `fastsd evaluate`: what each needs, and how it is taken from generated and real images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from fastsd.errors import FastsdError, nearest
from fastsd.evaluate.clip import Clip
from fastsd.evaluate.distances import (
    NEIGHBOURS,
    Floats,
    KernelDistance,
    PrecisionRecall,
    frechet_distance,
    inception_score,
    moments,
    squared_distances,
)
from fastsd.evaluate.extractors import Extractor
from fastsd.evaluate.images import Pixels, RealImages
from fastsd.evaluate.pairs import psnr, ssim
from fastsd.evaluate.resample import Figure, bootstrap
from fastsd.generate.latents import Codec, image_tensor
from fastsd.graph import Graphs

if TYPE_CHECKING:
    from fastsd.pipeline import Pipeline

Figures = dict[str, Figure]
IS_SPLITS = 10
AUTOENCODER_IMAGES = 500  # at most


@dataclass(frozen=True)
class Prompt:
    """A caption to generate from: `source`, the index of its image."""

    text: str
    source: int


@dataclass
class Evidence:
    """What the metrics look at, and features of it, each computed once.

    Attributes:
        generated: `[H, W, 3]` each; `prompts`: theirs.
        real: the images of --data; `galleries`: those of --gallery.
        size: (width, height) of the generated images, which real ones are brought to.
        reference: at most so many real images are compared with.
        rounds, seed: of the bootstrap.
        clip: the model of the CLIP score.
    """

    pipe: Pipeline
    generated: list[Pixels]
    prompts: list[Prompt]
    real: RealImages
    galleries: list[RealImages]
    extractor: Extractor
    size: tuple[int, int]
    reference: int
    rounds: int
    seed: int
    clip: Clip | None = None

    def figure(self, statistic: Callable[[NDArray[np.int64]], float], share: bool = False) -> Figure:
        """A statistic of the generated images, with its interval."""
        return bootstrap(statistic, len(self.generated), self.rounds, self.seed, share)

    def mean(self, values: Floats, share: bool = False) -> Figure:
        """The mean of values, with its interval."""
        return bootstrap(lambda rows: float(values[rows].mean()), len(values), self.rounds, self.seed, share)

    @cached_property
    def real_range(self) -> range:
        """Which real images are compared with: evenly spread over the folder."""
        step = max(1, math.ceil(len(self.real) / self.reference))
        return range(0, len(self.real), step)

    @cached_property
    def seen(self) -> tuple[Floats, Floats | None]:
        """Features of the generated images, and probabilities of the extractor's classes."""
        return self.extractor.features(self.generated)

    @cached_property
    def real_features(self) -> Floats:
        return self.extractor.features(self.real.pixels(self.real_range, self.size))[0]

    def probabilities(self) -> Floats:
        """Of the extractor's classes, `[N, K]`; `Measurement.of` asked for an extractor that has some."""
        found = self.seen[1]
        assert found is not None
        return found


def fid(evidence: Evidence) -> Figures:
    real = moments(evidence.real_features)
    x = evidence.seen[0]
    return {"fid": evidence.figure(lambda rows: frechet_distance(moments(x[rows]), real))}


def kid(evidence: Evidence) -> Figures:
    return {"kid": evidence.figure(KernelDistance(evidence.seen[0], evidence.real_features))}


def inception(evidence: Evidence) -> Figures:
    found = evidence.probabilities()
    return {"is": evidence.figure(lambda rows: inception_score(found[rows], IS_SPLITS))}


def precision_recall(evidence: Evidence) -> Figures:
    found = PrecisionRecall(evidence.seen[0], evidence.real_features)
    return {
        "precision": evidence.figure(found.precision, share=True),
        "recall": evidence.figure(found.recall, share=True),
    }


def clip_score(evidence: Evidence) -> Figures:
    """How well images fit their captions."""
    assert evidence.clip is not None  # `Measurement.of` asked for it
    scores = evidence.clip.scores(evidence.generated, [prompt.text for prompt in evidence.prompts])
    return {"clip": evidence.mean(scores)}


def accuracy(evidence: Evidence) -> Figures:
    """The share of generated images that the extractor's classifier takes for the class of their prompt."""
    labels = [evidence.real.images[prompt.source].label for prompt in evidence.prompts]
    right = evidence.probabilities().argmax(1) == np.array(labels)
    return {"accuracy": evidence.mean(right.astype(np.float64), share=True)}


def nearest_image(evidence: Evidence) -> Figures:
    """The share of generated images whose nearest one, of all in --data and --gallery, is the one of their caption.

    Images that are equal in every pixel are one. Where metadata.jsonl says how a caption was held out, each kind has a
    figure of its own.
    """
    names: list[bytes] = []
    parts = [evidence.real, *evidence.galleries]

    def noted() -> Iterator[Pixels]:
        for part in parts:
            for pixels in part.pixels(range(len(part)), evidence.size):
                names.append(pixels.tobytes())
                yield pixels

    gallery = evidence.extractor.features(noted())[0]
    found = squared_distances(evidence.seen[0], gallery).argmin(1)
    right = np.array([names[index] == names[prompt.source] for index, prompt in zip(found, evidence.prompts)], float)
    figures = {f"nearest of {len(set(names))}": evidence.mean(right, share=True)}
    kinds = np.array([evidence.real.images[prompt.source].kind for prompt in evidence.prompts])
    for kind in sorted(set(kinds) - {""}):
        own = right[kinds == kind]
        figures[f"nearest, {kind}"] = evidence.mean(own, share=True)
    return figures


def autoencoder(evidence: Evidence) -> Figures:
    """How near real images come back from the model's autoencoder, encoded to the mean and decoded."""
    codec = Codec(evidence.pipe.components.vae, Graphs())
    ratios, likeness = [], []
    for pixels in evidence.real.pixels(evidence.real_range[:AUTOENCODER_IMAGES], evidence.size):
        with torch.inference_mode():
            latent = codec.scale(codec.mode(image_tensor(Image.fromarray(pixels)), tiled=False))
            back = codec.decode(latent, tiled=False)[0]
        ratios.append(psnr(pixels, back))
        likeness.append(ssim(pixels, back))
    return {
        "autoencoder psnr": evidence.mean(np.array(ratios)),
        "autoencoder ssim": evidence.mean(np.array(likeness)),
    }


@dataclass(frozen=True)
class Metric:
    """A metric: how it is taken, the unit, and how many images it needs of each kind.

    Attributes:
        better: "lower" or "higher".
        classes: it needs an extractor with classes.
    """

    take: Callable[[Evidence], Figures]
    better: str
    least: int
    classes: bool = False


METRICS = {
    "fid": Metric(fid, "lower", 2),
    "kid": Metric(kid, "lower", 2),
    "is": Metric(inception, "higher", IS_SPLITS, classes=True),
    "clip": Metric(clip_score, "higher", 1),
    "precision-recall": Metric(precision_recall, "higher", NEIGHBOURS + 1),
    "accuracy": Metric(accuracy, "higher", 1, classes=True),
    "nearest": Metric(nearest_image, "higher", 1),
    "autoencoder": Metric(autoencoder, "higher", 1),
}


def parse_metrics(text: str) -> list[str]:
    """The names in "fid,kid", each once.

    Raises:
        FastsdError: one is unknown; the nearest is named.
    """
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name not in METRICS:
            raise FastsdError(f"{name!r} is none of {', '.join(METRICS)}{nearest(name, METRICS)}", argument="--metrics")
    if not names:
        raise FastsdError(f"it should name some of {', '.join(METRICS)}", argument="--metrics", value=text)
    return names


def check_needs(names: list[str], generated: int, real: RealImages, extractor: Extractor) -> None:
    """Refuse what a metric cannot be taken from, before anything is generated.

    Raises:
        FastsdError: too few images, an extractor without classes, images without labels.
    """
    for name in names:
        if METRICS[name].classes and extractor.name == "pixels":
            raise FastsdError(f"{name} needs classes: inception:FILE or reader:FILE", argument="--extractor")
        least = METRICS[name].least
        if generated < least:
            raise FastsdError(f"{name} needs at least {least}", argument="--count", value=generated)
        if len(real) < least and name != "is":
            raise FastsdError(
                f"{name} needs at least {least} images, and there are {len(real)}", argument="--data", path=real.folder
            )
    if "accuracy" in names:
        count = len(extractor.classes)
        if not count:
            raise FastsdError("accuracy needs reader:FILE, whose classes have names", argument="--extractor")
        if any(image.label is None or image.label >= count for image in real.images):
            raise FastsdError(
                f'accuracy needs a "label" from 0 to {count - 1} of each image in metadata.jsonl',
                argument="--data",
                path=real.folder,
            )
