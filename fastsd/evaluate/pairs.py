"""How near two images are to each other, pixel by pixel: PSNR and SSIM of uint8 images `[H, W, 3]`."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fastsd.errors import FastsdError

SIGMA, RADIUS = 1.5, 5  # the paper's Gaussian window of 11 x 11
K1, K2 = 0.01, 0.03


def psnr(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """The peak signal-to-noise ratio in decibels, 10 log10(255^2 / mean squared difference); infinite for equal images.

    Raises:
        FastsdError: the sizes differ.
    """
    _check(a, b)
    mean = float(((a.astype(np.float64) - b.astype(np.float64)) ** 2).mean())
    return 10 * math.log10(255**2 / mean) if mean else math.inf


def ssim(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """The structural similarity (Wang et al. 2004): 1 for equal images.

    Means, variances and covariance under a Gaussian window of 11 x 11 and sigma 1.5, of each channel; the mean over
    channels and over the windows that lie within the image.

    Raises:
        FastsdError: the sizes differ, or a side is shorter than the window.
    """
    _check(a, b)
    if min(a.shape[:2]) < 2 * RADIUS + 1:
        raise FastsdError(f"SSIM needs sides of at least {2 * RADIUS + 1} pixels, not {a.shape[1]} x {a.shape[0]}")
    x, y = a.astype(np.float64), b.astype(np.float64)
    mean_x, mean_y = _window(x), _window(y)
    var_x, var_y = _window(x * x) - mean_x**2, _window(y * y) - mean_y**2
    both = _window(x * y) - mean_x * mean_y
    c1, c2 = (K1 * 255) ** 2, (K2 * 255) ** 2
    found = (2 * mean_x * mean_y + c1) * (2 * both + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return float(found.mean())


def _window(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """The weighted means under the window, first along rows, then along columns."""
    weights = np.exp(-0.5 * (np.arange(-RADIUS, RADIUS + 1) / SIGMA) ** 2)
    weights /= weights.sum()
    for axis in (0, 1):
        length = x.shape[axis] - 2 * RADIUS
        parts = [weight * x.take(range(k, k + length), axis) for k, weight in enumerate(weights)]
        x = np.sum(parts, axis=0)
    return x


def _check(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> None:
    if a.shape != b.shape:
        raise FastsdError(f"images of different sizes: {a.shape[1]} x {a.shape[0]} and {b.shape[1]} x {b.shape[0]}")
