"""How right, how various and how new drawn digits are. Arrays in, figures out; `checks` says which figures will do."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from fastsd.train.strokes import STYLE_WORDS, measure, styles

Floats = NDArray[np.floating]
CANONICAL_SIDE = 32
CANONICAL_RADIUS = 8.5  # pixels; a straight line, the longest shape of this radius, is then 29 pixels long
NOT_INK = 0.1  # grey below this is the decoder's haze, which would count in moments as far from the centre as it lies


@dataclass(frozen=True)
class Effect:
    """How far a style word moves its measure.

    Attributes:
        drawn: mean over pairs of (high word's measure - low word's), same digit and same noise in a pair.
        error: standard error of `drawn`.
        real: the same difference between real pictures that deserve the words, mean over the digits.
    """

    drawn: float
    error: float
    real: float


def effect(low: Floats, high: Floats, real: float) -> Effect:
    """The effect of a word from the measures of pairs of drawings, `[N]` each; N at least 2."""
    pairs = np.asarray(high, dtype=np.float64) - np.asarray(low, dtype=np.float64)
    return Effect(float(pairs.mean()), float(pairs.std(ddof=1) / np.sqrt(len(pairs))), real)


def real_effects(pictures: torch.Tensor, labels: NDArray[np.generic], share: float) -> dict[str, float]:
    """For each attribute, the difference between real pictures that get its high word and those that get its low one.

    Args:
        pictures: `[N, H, W]` in [0, 1]. labels: `[N]`.
        share: of a digit's pictures at each end, as in training.
    """
    strokes = measure(pictures.numpy())
    ends = styles(strokes, labels, share)
    found = {}
    for column, name in enumerate(STYLE_WORDS):
        values = getattr(strokes, name).astype(np.float64)
        by_digit = [
            values[(labels == d) & (ends[:, column] > 0)].mean() - values[(labels == d) & (ends[:, column] < 0)].mean()
            for d in np.unique(labels)
        ]
        found[name] = float(np.mean(by_digit))
    return found


def pairwise_distance(pictures: torch.Tensor) -> float:
    """Mean Euclidean distance over all pairs of `pictures` `[N, H, W]`, N at least 2; its expectation is free of N."""
    return float(torch.pdist(pictures.flatten(1).double()).mean())


def diversity(
    pictures: torch.Tensor, digits: NDArray[np.generic], real: torch.Tensor, labels: NDArray[np.generic]
) -> dict[int, float]:
    """For each digit, the mean pairwise distance of drawn pictures over that of real ones.

    Args:
        pictures, real: `[N, H, W]` and `[M, H, W]`, both rendered alike. digits, labels: `[N]` and `[M]`.
    """
    return {
        int(d): pairwise_distance(pictures[digits == d]) / pairwise_distance(real[labels == d])
        for d in np.unique(digits)
    }


def canonical(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures without what an enlarged, slanted or moved copy differs in: centred, upright, of one size.

    Mass centre to the centre, sheared until x and y are uncorrelated, root mean square radius `CANONICAL_RADIUS`.

    Args:
        pictures: `[N, H, W]` in [0, 1], white on black. An empty picture stays empty.

    Returns:
        `[N, 32, 32]` in [0, 1].
    """
    count, height, width = pictures.shape
    ink = (pictures - NOT_INK).clamp_min(0) / (1 - NOT_INK)
    mass = ink.sum((1, 2)).clamp_min(1e-6)
    # Pixels from the middle of the frame.
    y, x = torch.arange(height) + 0.5 - height / 2, torch.arange(width) + 0.5 - width / 2
    by_row, by_column = ink.sum(2), ink.sum(1)
    row, column = by_row @ y / mass, by_column @ x / mass
    yy = (by_row @ y.square() / mass - row.square()).clamp_min(0.25)
    xx = (by_column @ x.square() / mass - column.square()).clamp_min(0.25)
    xy = torch.einsum("nhw,h,w->n", ink, y, x) / mass - row * column
    shear = xy / yy
    radius = (yy + xx - xy * shear).sqrt()
    # grid_sample asks where each output pixel comes from, input and output in [-1, 1] from edge to edge.
    zoom = radius / CANONICAL_RADIUS * CANONICAL_SIDE
    inverse = torch.zeros(count, 2, 3)
    inverse[:, 0, 0], inverse[:, 0, 1], inverse[:, 0, 2] = zoom / width, shear * zoom / width, column * 2 / width
    inverse[:, 1, 1], inverse[:, 1, 2] = zoom / height, row * 2 / height
    grid = F.affine_grid(inverse, [count, 1, CANONICAL_SIDE, CANONICAL_SIDE], align_corners=False)
    # Blurred first where the picture shrinks, so that no stroke falls between the samples.
    source = F.avg_pool2d(ink[:, None], 3, stride=1, padding=1)
    return F.grid_sample(source, grid, mode="bilinear", align_corners=False)[:, 0]


def nearest(
    queries: torch.Tensor, base: torch.Tensor, *, skip_first: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest vector of `base` `[M, D]` to each of `queries` `[N, D]`, by Euclidean distance.

    |q - b|² = |q|² + |b|² - 2 q·b, one matrix product for each block of queries; the found distance is computed again
    directly, since the formula loses digits where q is nearly b.

    Args:
        skip_first: take the second nearest: for queries that stand in `base` themselves.

    Returns:
        Distances and indices into `base`, `[N]` each.
    """
    squares = base.square().sum(1)
    place = 1 if skip_first else 0
    found = [
        torch.addmm(squares, block, base.T, alpha=-2).topk(place + 1, dim=1, largest=False).indices[:, place]
        for block in queries.split(512)
    ]
    index = torch.cat(found)
    return (queries - base[index]).norm(dim=1), index


def novelty(pictures: torch.Tensor, training: torch.Tensor) -> Floats:
    """How new each picture is, `[N]`: 0 is a copy of a training picture, 1 as new as real pictures are to each other.

    With t the training picture nearest to a drawing s, this is |s - t| / |t - t'|, where t' is the training picture
    nearest to t: is the drawing further from its nearest real picture than the nearest other real picture is? Each
    drawing is so measured by how densely real pictures stand in its own neighbourhood, and plain digits, which all
    resemble each other, are not taken for copies.

    Args:
        pictures: `[N, 32, 32]`, training: `[M, 32, 32]`, both from `canonical`.
    """
    base = training.flatten(1)
    distance, index = nearest(pictures.flatten(1), base)
    between, _ = nearest(base[index], base, skip_first=True)
    return (distance / between.clamp_min(1e-6)).numpy()
