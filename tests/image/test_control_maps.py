"""Maps made of images; edges are tested where flags make them, in tests/cli/test_controls.py."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from fastsd.errors import FastsdError
from fastsd.image.control_maps import color_grid

pytest.importorskip("cv2")


def cubic_at_middles(pixels: np.ndarray) -> np.ndarray:
    """Keys's cubic convolution with a = -0.75, OpenCV's, halfway between the two pixels in the middle of each 64: along
    the first axis, of the pixels 30 to 33."""
    squares = pixels.reshape(-1, 64, *pixels.shape[1:])[:, 30:34]
    return np.tensordot(squares, [-0.09375, 0.59375, 0.59375, -0.09375], axes=(1, 0))


def test_the_colours_of_squares() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (512, 768, 3), dtype=np.uint8)
    found = np.asarray(color_grid(Image.fromarray(pixels)))
    wide = cubic_at_middles(pixels.astype(float)).swapaxes(0, 1)
    wanted = cubic_at_middles(wide).swapaxes(0, 1)
    squares = found.reshape(8, 64, 12, 64, 3)
    assert (squares == squares[:, :1, :, :1]).all()
    # OpenCV's weights have 11 bits: two passes of four weights, each off by 2^-12 of 255 at most; and it rounds.
    assert np.abs(squares[:, 0, :, 0] - wanted.clip(0, 255)).max() <= 0.5 + 8 * 255 / 2**12


def test_larger_and_smaller_images_have_as_many_squares() -> None:
    """Halving takes the mean of each four pixels; of equal ones it is their value."""
    pixels = np.random.default_rng(1).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    wanted = np.asarray(color_grid(Image.fromarray(pixels)))
    twice = np.asarray(color_grid(Image.fromarray(pixels.repeat(2, 0).repeat(2, 1))))
    np.testing.assert_array_equal(twice, wanted.repeat(2, 0).repeat(2, 1))
    small = color_grid(Image.new("RGB", (30, 20), (10, 200, 90)))
    assert small.size == (30, 20) and small.getcolors() == [(600, (10, 200, 90))]
    assert len(color_grid(Image.fromarray(pixels), 64).getcolors() or ()) == 1


def test_a_long_thin_image() -> None:
    with pytest.raises(FastsdError, match="too long and thin"):
        color_grid(Image.new("RGB", (1, 600)))  # it would be 512 x 307200
    assert color_grid(Image.new("RGB", (30, 600))).size == (30, 600)
