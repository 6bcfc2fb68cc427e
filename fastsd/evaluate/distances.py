"""Distances between two sets of images, and scores of one, from their features: in float64, with their formulas.

`x` is `[N, D]`, features of the generated images; `y` is `[M, D]`, those of the real ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastsd.errors import FastsdError

Floats = NDArray[np.float64]
NEIGHBOURS = 3  # k of precision and recall, as in the paper
CHUNK = 1024  # rows of a matrix of distances that are made at a time


@dataclass(frozen=True)
class Moments:
    """Mean `[D]` and covariance of features; the covariance as `factor` `[R, D]`: factor^T factor."""

    mean: Floats
    factor: Floats


def moments(x: Floats) -> Moments:
    """Mean and unbiased covariance of `[N, D]`, N at least 2. R is the smaller of N and D."""
    if len(x) < 2:
        raise FastsdError(f"a covariance needs at least 2 images, not {len(x)}")
    mean = x.mean(0)
    centred = (x - mean) / np.sqrt(len(x) - 1)
    if len(x) <= x.shape[1]:
        return Moments(mean, centred)
    return Moments(mean, np.asarray(np.linalg.qr(centred, mode="r")))


def moments_of(mean: Floats, covariance: Floats) -> Moments:
    """Moments from a symmetric covariance `[D, D]` without negative eigenvalues."""
    values, vectors = np.linalg.eigh(covariance)
    return Moments(mean, np.sqrt(values.clip(0))[:, None] * vectors.T)


def frechet_distance(a: Moments, b: Moments) -> float:
    """The Fréchet distance of two Gaussians (Dowson and Landau 1982); FID on Inception's features (Heusel et al. 2017).

        |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2))

    With A = F^T F and B = G^T G, the trace of the root is the sum of the singular values of F G^T. Taken so, its error
    is of the order of one rounding; the root of A B itself loses half of the digits where A is singular.
    """
    shift = a.mean - b.mean
    cross = np.linalg.svd(a.factor @ b.factor.T, compute_uv=False).sum()
    return float(shift @ shift + (a.factor**2).sum() + (b.factor**2).sum() - 2 * cross)


class KernelDistance:
    """The squared maximum mean discrepancy, unbiased, with the kernel (u . v / D + 1)^3: KID (Binkowski et al. 2018).

        sum_{i != j} k(x_i, x_j) / (N (N - 1)) + the same of y - 2 mean_{i, j} k(x_i, y_j)

    Its expectation is 0 where both sets are of one distribution, so that single values may be negative.
    """

    def __init__(self, x: Floats, y: Floats):
        if min(len(x), len(y)) < 2:
            raise FastsdError(f"KID needs at least 2 images of each kind, not {len(x)} and {len(y)}")
        self._xx, self._to_y = _kernel(x, x), _kernel(x, y).mean(1)
        self._yy = _mean_of_pairs(_kernel(y, y), np.ones(len(y)))

    def __call__(self, rows: NDArray[np.int64] | None = None) -> float:
        """The distance with each image of x as often as `rows` names it; pairs of one image with itself never count."""
        times = np.ones(len(self._xx)) if rows is None else np.bincount(rows, minlength=len(self._xx)).astype(float)
        return _mean_of_pairs(self._xx, times) + self._yy - 2 * float(times @ self._to_y / times.sum())


def _kernel(u: Floats, v: Floats) -> Floats:
    return (u @ v.T / u.shape[1] + 1) ** 3


def _mean_of_pairs(kernel: Floats, times: Floats) -> float:
    total = times @ kernel @ times - times**2 @ kernel.diagonal()
    return float(total / (times.sum() ** 2 - (times**2).sum()))


def inception_score(probabilities: Floats, splits: int = 10) -> float:
    """The mean over `splits` parts of exp(mean KL(p(class | image) || p(class))) (Salimans et al. 2016).

    Args:
        probabilities: `[N, K]`, a row for each image in the order of generation; N at least `splits`.
    """
    if len(probabilities) < splits:
        raise FastsdError(f"IS needs at least {splits} images, one for each of its parts, not {len(probabilities)}")
    scores = []
    for part in np.array_split(probabilities, splits):
        mean = part.mean(0)
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = np.where(part > 0, part * (np.log(part) - np.log(mean)), 0.0)
        scores.append(np.exp(terms.sum(1).mean()))
    return float(np.mean(scores))


class PrecisionRecall:
    """Improved precision and recall (Kynkaanniemi et al. 2019).

    A set's manifold is the union of balls around its features, each reaching the k-th nearest other one. Precision is
    the share of generated images within the manifold of the real ones, recall the share of real ones within that of
    the generated.
    """

    def __init__(self, x: Floats, y: Floats, k: int = NEIGHBOURS):
        if min(len(x), len(y)) <= k:
            raise FastsdError(f"precision and recall need more than {k} images of each kind, not {len(x)} and {len(y)}")
        self.k = k
        self._xx, self._xy = squared_distances(x, x), squared_distances(x, y)
        self._inside_y: NDArray[np.bool_] = np.any(self._xy <= _radii(squared_distances(y, y), k)[None], axis=1)

    def precision(self, rows: NDArray[np.int64] | None = None) -> float:
        """`rows`: which generated images, repeated ones counted as often."""
        return float(self._inside_y[slice(None) if rows is None else rows].mean())

    def recall(self, rows: NDArray[np.int64] | None = None) -> float:
        """`rows`: which generated images make the manifold; a repeated one is one point of it."""
        chosen = np.arange(len(self._xx)) if rows is None else np.unique(rows)
        if len(chosen) <= self.k:
            return 0.0
        radii = _radii(self._xx[np.ix_(chosen, chosen)], self.k)
        return float((self._xy[chosen] <= radii[:, None]).any(0).mean())


def _radii(distances: Floats, k: int) -> Floats:
    """The squared distance of each point to its k-th nearest other one; `[N, N]` has the point itself in it."""
    return np.partition(distances, k, axis=1)[:, k]


def squared_distances(u: Floats, v: Floats) -> Floats:
    """`[N, M]`, from the differences themselves: exactly 0 between equal rows."""
    found = np.empty((len(u), len(v)))
    lengths = (v**2).sum(1)
    for start in range(0, len(u), CHUNK):
        part = u[start : start + CHUNK]
        found[start : start + CHUNK] = (part**2).sum(1)[:, None] + lengths - 2 * part @ v.T
    # The formula above loses the digits of near pairs; those are few, and are computed again.
    size = lengths.mean() + (u**2).sum(1).mean()
    for i, j in zip(*np.nonzero(found < 1e-6 * size)):
        found[i, j] = ((u[i] - v[j]) ** 2).sum()
    return found
