"""Enlarged digits: complete, in place, sheared by the given amount."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from fastsd.train.digits import IMAGE_SIDE, MNIST_SIDE, enlarge, read_digits
from fastsd.train.strokes import measure

ROOT = Path(__file__).parents[2]


def centre_of_mass(images: torch.Tensor, axis: int) -> torch.Tensor:
    profile = images.sum(3 - axis)
    positions = torch.arange(profile.shape[1]) + 0.5
    return profile @ positions / profile.sum(1)


def test_enlarged_digits_keep_their_ink_position_and_slant() -> None:
    digits = read_digits(ROOT / "data" / "mnist", "t10k")
    assert len(digits.images) == len(digits.labels) == 10_000
    images = digits.images[:200]
    large = enlarge(images, 1.15, 0.2)
    edges = torch.cat([large[:, 0], large[:, -1], large[:, :, 0], large[:, :, -1]], dim=1)
    assert float(edges.max()) == 0.0
    # The centre of mass scales with the image; the contrast shifts it by less than a pixel.
    for axis in (1, 2):
        expected = centre_of_mass(torch.from_numpy(images.copy()).float(), axis) * IMAGE_SIDE / MNIST_SIDE
        assert float((centre_of_mass(enlarge(images), axis) - expected).abs().max()) < 1.0
    # A shear adds to the slant, exactly so for the second moments of the same ink.
    plain, sheared = (measure(enlarge(images, 0.8, shear).numpy()).slant for shear in (0.0, 0.2))
    np.testing.assert_allclose(sheared - plain, 0.2, atol=0.03)
