"""Measures of generated digits: effects of style words, diversity, novelty. `checks` has the limits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from fastsd.train.strokes import STYLE_WORDS, measure, styles

Floats = NDArray[np.floating]
CANONICAL_SIDE = 32
CANONICAL_RADIUS = 8.5  # pixels; a straight line, the longest shape of this radius, is 29 pixels long
NOT_INK = 0.1  # grey below this is decoder haze, which would distort the moments in proportion to its distance


@dataclass(frozen=True)
class Effect:
    """How far a style word shifts its measure.

    Attributes:
        generated: mean over pairs of (measure with the high word - with the low word); the images of a pair share digit
            and noise.
        error: standard error of `generated`.
        real: the same difference between real images that the words describe, mean over the digits.
    """

    generated: float
    error: float
    real: float


def effect(low: Floats, high: Floats, real: float) -> Effect:
    """The effect of a style word, from the measures of paired images, `[N]` each; N at least 2."""
    pairs = np.asarray(high, dtype=np.float64) - np.asarray(low, dtype=np.float64)
    return Effect(float(pairs.mean()), float(pairs.std(ddof=1) / np.sqrt(len(pairs))), real)


def real_effects(images: torch.Tensor, labels: NDArray[np.generic], share: float) -> dict[str, float]:
    """For each attribute, the mean difference between real images at its high end and at its low end.

    Args:
        images: `[N, H, W]` in [0, 1]. labels: `[N]`.
        share: of the images of a digit at each end, as in training.
    """
    strokes = measure(images.numpy())
    ends = styles(strokes, labels, share)
    effects = {}
    for column, name in enumerate(STYLE_WORDS):
        values = getattr(strokes, name).astype(np.float64)
        by_digit = [
            values[(labels == d) & (ends[:, column] > 0)].mean() - values[(labels == d) & (ends[:, column] < 0)].mean()
            for d in np.unique(labels)
        ]
        effects[name] = float(np.mean(by_digit))
    return effects


def pairwise_distance(images: torch.Tensor) -> float:
    """Mean Euclidean distance over all pairs of `images` `[N, H, W]`, N at least 2. Its expectation is free of N."""
    return float(torch.pdist(images.flatten(1).double()).mean())


def diversity(
    images: torch.Tensor, digits: NDArray[np.generic], real: torch.Tensor, labels: NDArray[np.generic]
) -> dict[int, float]:
    """For each digit, the mean pairwise distance of generated images divided by that of real images.

    Args:
        images, real: `[N, H, W]` and `[M, H, W]`, at the same size and contrast. digits, labels: `[N]` and `[M]`.
    """
    return {
        int(d): pairwise_distance(images[digits == d]) / pairwise_distance(real[labels == d]) for d in np.unique(digits)
    }


def canonical(images: torch.Tensor) -> torch.Tensor:
    """Normalise position, slant and size, so that a moved, slanted or enlarged copy matches its original.

    Centre of mass at the centre, sheared until x and y are uncorrelated, root mean square radius `CANONICAL_RADIUS`.

    Args:
        images: `[N, H, W]` in [0, 1], white on black. An empty image stays empty.

    Returns:
        `[N, 32, 32]` in [0, 1].
    """
    count, height, width = images.shape
    ink = (images - NOT_INK).clamp_min(0) / (1 - NOT_INK)
    mass = ink.sum((1, 2)).clamp_min(1e-6)
    # Pixels from the centre of the frame.
    y, x = (
        torch.arange(height, dtype=torch.float32, device="cpu") + 0.5 - height / 2,
        torch.arange(width, dtype=torch.float32, device="cpu") + 0.5 - width / 2,
    )
    by_row, by_column = ink.sum(2), ink.sum(1)
    row, column = by_row @ y / mass, by_column @ x / mass
    yy = (by_row @ y.square() / mass - row.square()).clamp_min(0.25)
    xx = (by_column @ x.square() / mass - column.square()).clamp_min(0.25)
    xy = torch.einsum("nhw,h,w->n", ink, y, x) / mass - row * column
    shear = xy / yy
    radius = (yy + xx - xy * shear).sqrt()
    # grid_sample takes the source position of each output pixel; both range over [-1, 1] from edge to edge.
    zoom = radius / CANONICAL_RADIUS * CANONICAL_SIDE
    inverse = torch.zeros(count, 2, 3, dtype=torch.float32, device="cpu")
    inverse[:, 0, 0], inverse[:, 0, 1], inverse[:, 0, 2] = zoom / width, shear * zoom / width, column * 2 / width
    inverse[:, 1, 1], inverse[:, 1, 2] = zoom / height, row * 2 / height
    grid = F.affine_grid(inverse, [count, 1, CANONICAL_SIDE, CANONICAL_SIDE], align_corners=False)
    # Blurred first: where the image shrinks, a thin stroke could otherwise fall between the samples.
    source = F.avg_pool2d(ink[:, None], 3, stride=1, padding=1)
    return F.grid_sample(source, grid, mode="bilinear", align_corners=False)[:, 0]


def nearest(
    queries: torch.Tensor, base: torch.Tensor, *, skip_first: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest vector of `base` `[M, D]` to each of `queries` `[N, D]`, by Euclidean distance.

    |q - b|² = |q|² + |b|² - 2 q·b, one matrix product for each block of queries. The returned distances are computed
    directly, since the formula cancels where q is close to b.

    Args:
        skip_first: return the second nearest, for queries that are in `base` themselves.

    Returns:
        Distances and indices into `base`, `[N]` each.
    """
    squares = base.square().sum(1)
    rank = 1 if skip_first else 0
    blocks = [
        torch.addmm(squares, block, base.T, alpha=-2).topk(rank + 1, dim=1, largest=False).indices[:, rank]
        for block in queries.split(512)
    ]
    index = torch.cat(blocks)
    return (queries - base[index]).norm(dim=1), index


def novelty(images: torch.Tensor, training: torch.Tensor) -> Floats:
    """The novelty of each image, `[N]`: 0 for a copy of a training image, 1 for the distance between real images.

    |s - t| / |t - t'|, where t is the training image nearest to the image s, and t' the training image nearest to t.
    The denominator is the spacing of real images near s, so plain digits, which all resemble each other, do not count
    as copies.

    Args:
        images: `[N, 32, 32]`, training: `[M, 32, 32]`, both from `canonical`.
    """
    base = training.flatten(1)
    distance, index = nearest(images.flatten(1), base)
    spacing, _ = nearest(base[index], base, skip_first=True)
    return (distance / spacing.clamp_min(1e-6)).numpy()
