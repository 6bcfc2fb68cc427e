"""A measurement from its flags: which captions, which real images, which metrics; then the figures."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsd.errors import FastsdError, about
from fastsd.evaluate.clip import Clip, load_clip, weights_of
from fastsd.evaluate.extractors import Extractor, file_sha256, load_extractor
from fastsd.evaluate.generated import Progress, choose_prompts, generate
from fastsd.evaluate.images import Pixels, RealImages, read_images
from fastsd.evaluate.metrics import METRICS, Evidence, Prompt, check_needs, parse_metrics
from fastsd.evaluate.report import Report
from fastsd.evaluate.resample import Figure

if TYPE_CHECKING:
    from fastsd.pipeline import Pipeline

LIMITS = {"count": (1, 50_000), "reference": (2, 100_000), "bootstrap": (0, 10_000), "seed": (0, 2**32)}


@dataclass(frozen=True)
class Measurement:
    """What is measured, the same for every model that it is taken of.

    Attributes:
        names: of the metrics.
        prompts: what is generated; the k-th image has seed `seed + k`.
        real, galleries: the real images.
        reference, rounds: at most so many real images; rounds of the bootstrap.
        clip: the model of the CLIP score, and what the report calls it.
    """

    names: list[str]
    prompts: list[Prompt]
    real: RealImages
    galleries: list[RealImages]
    extractor: Extractor
    seed: int
    reference: int
    rounds: int
    clip: tuple[Clip, str] | None = None

    @classmethod
    def of(cls, args: argparse.Namespace) -> Measurement:
        """From the flags of `add_metric_arguments`, `--data` among them.

        Raises:
            FastsdError: a number out of range, an unknown metric, too few images, no such folder or file.
        """
        for name, (low, high) in LIMITS.items():
            if not low <= getattr(args, name) <= high:
                raise FastsdError(f"it should be {low:,} to {high:,}", argument=f"--{name}", value=getattr(args, name))
        names = parse_metrics(args.metrics)
        clip = _load_clip(args.clip, "clip" in names)
        extractor = load_extractor(args.extractor)
        real = read_images(Path(args.data))
        check_needs(names, args.count, real, extractor)
        galleries = [read_images(Path(folder), "--gallery") for folder in args.gallery]
        prompts = choose_prompts(real, args.count, args.seed)
        return cls(names, prompts, real, galleries, extractor, args.seed, args.reference, args.bootstrap, clip)

    def generate(self, pipe: Pipeline, settings: dict[str, Any], progress: Progress) -> list[Pixels]:
        """The images of all prompts."""
        return generate(pipe, [prompt.text for prompt in self.prompts], self.seed, settings, progress)

    def take(self, pipe: Pipeline, generated: list[Pixels], settings: dict[str, Any], model: str) -> Report:
        """The figures of generated images.

        Args:
            model, settings: for the report.
        """
        size = (generated[0].shape[1], generated[0].shape[0])
        evidence = Evidence(
            pipe,
            generated,
            self.prompts,
            self.real,
            self.galleries,
            self.extractor,
            size,
            self.reference,
            self.rounds,
            self.seed,
            self.clip[0] if self.clip else None,
        )
        figures: dict[str, Figure] = {}
        for name in self.names:
            figures |= METRICS[name].take(evidence)
        about = {
            "model": model,
            "settings": settings,
            "seed": self.seed,
            "count": len(generated),
            "size": list(size),
            "extractor": self.extractor.title,
            "extractor_sha256": self.extractor.sha256,
            "clip": self.clip[1] if self.clip else "",
            "data": {"folder": self.real.folder.name, "sha256": self.real.sha256},
            "reference": len(evidence.real_range),
            "bootstrap": self.rounds,
        }
        return Report(figures, about, tuple(prompt.text for prompt in self.prompts))


def _load_clip(folder: str | None, wanted: bool) -> tuple[Clip, str] | None:
    """The model of the CLIP score and its name for the report; None where no metric needs one.

    Raises:
        FastsdError: a folder is missing, or given without need; it holds no CLIP.
    """
    if folder is None and not wanted:
        return None
    if folder is None or not wanted:
        which = "the metric clip needs a CLIP model's folder" if wanted else "belongs to the metric clip"
        raise FastsdError(which, argument="--clip")
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise FastsdError("no such folder", argument="--clip", path=path)
    with about("--clip"):
        return load_clip(path), f"clip (sha256 {file_sha256(weights_of(path))[:12]})"
