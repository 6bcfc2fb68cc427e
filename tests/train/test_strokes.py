"""Stroke measures against shapes whose measures are known."""

from __future__ import annotations

import numpy as np
import pytest

from fastsd.train.strokes import STYLE_WORDS, extremes, measure, styles

SIDE, FINE = 64, 4


def render(mask: np.ndarray) -> np.ndarray:
    """An image `[1, 64, 64]` from a mask of four times the resolution."""
    return mask.reshape(SIDE, FINE, SIDE, FINE).mean((1, 3), dtype=np.float32)[None]


def coordinates() -> tuple[np.ndarray, np.ndarray]:
    """x (to the right) and y (upwards) from the centre, in pixels."""
    axis = (np.arange(SIDE * FINE) + 0.5) / FINE - SIDE / 2
    x, y = np.meshgrid(axis, -axis)
    return x, y


def bar(width: float, length: float, slant: float = 0.0) -> np.ndarray:
    x, y = coordinates()
    return render((abs(x - slant * y) < width / 2) & (abs(y) < length / 2))


@pytest.mark.parametrize("inner, outer", [(16, 20), (12, 20), (20, 22)])
def test_the_width_of_a_ring_is_exact(inner: float, outer: float) -> None:
    # Area pi (R^2 - r^2), outline 2 pi (R + r): twice their ratio is R - r. Finite differences of pixels measure the
    # outline of a circle to within a few per cent, depending on direction.
    x, y = coordinates()
    radius = np.hypot(x, y)
    assert measure(render((radius > inner) & (radius < outer))).width[0] == pytest.approx(outer - inner, rel=0.05)


@pytest.mark.parametrize("width", [2, 4, 8])
@pytest.mark.parametrize("slant", [0.0, 0.3, -0.3])
def test_the_width_of_a_bar(width: float, slant: float) -> None:
    # The outline includes the two ends: 2 w l / (2 l + 2 w). Shear lengthens the sides.
    length = 44.0
    sides = 2 * length * np.hypot(1, slant) + 2 * width
    assert measure(bar(width, length, slant)).width[0] == pytest.approx(2 * width * length / sides, rel=0.05)


@pytest.mark.parametrize("slant", [-0.5, -0.2, 0.0, 0.2, 0.5])
def test_the_slant_of_a_bar(slant: float) -> None:
    assert measure(bar(4, 40, slant)).slant[0] == pytest.approx(slant, abs=0.01)


def test_size_is_the_height() -> None:
    assert [measure(bar(6, height)).size[0] for height in (20, 41, 60)] == [20, 42, 60]  # 41: half rows at both ends


def test_thickness_does_not_depend_on_scale() -> None:
    small, large = measure(bar(3, 20)), measure(bar(9, 60))
    assert small.thickness[0] == pytest.approx(large.thickness[0], rel=0.05)
    assert large.width[0] == pytest.approx(3 * small.width[0], rel=0.05)


def test_bytes_and_floats_agree_and_an_empty_image_is_zero() -> None:
    image = bar(5, 30, 0.1)
    as_bytes = measure((image * 255).round().astype(np.uint8))
    for name in ("width", "slant", "size"):
        assert getattr(as_bytes, name) == pytest.approx(getattr(measure(image), name), rel=0.01)
    empty = measure(np.zeros((2, 64, 64), np.float32))
    assert not empty.width.any() and not empty.slant.any() and not empty.size.any()


def test_images_are_measured_independently() -> None:
    images = np.concatenate([bar(3, 30, 0.2), bar(9, 50, -0.4)])
    together = measure(images)
    for i in range(2):
        alone = measure(images[i : i + 1])
        np.testing.assert_allclose(together.slant[i], alone.slant[0], rtol=1e-5)
        np.testing.assert_allclose(together.width[i], alone.width[0], rtol=1e-5)


def test_extremes_are_found_within_each_label() -> None:
    generator = np.random.default_rng(0)
    labels = np.repeat([0, 1], 1000)
    values = generator.normal(size=2000).astype(np.float32) + 100 * labels
    ends = extremes(values, labels, 0.25)
    for label in (0, 1):
        selected, marks = values[labels == label], ends[labels == label]
        assert (marks == -1).sum() == 250 and (marks == 1).sum() == 250
        low, middle, high = (selected[marks == end] for end in (-1, 0, 1))
        assert low.max() < middle.min() and middle.max() < high.min()


def test_styles_are_in_the_order_of_the_words() -> None:
    bars = [bar(2, 40), bar(10, 40), bar(4, 40, -0.4), bar(4, 40, 0.4), bar(2, 20), bar(5, 60)]
    ends = styles(measure(np.concatenate(bars)), np.zeros(len(bars), np.uint8), 0.17)
    assert list(STYLE_WORDS) == ["thickness", "slant", "size"]
    assert ends[1, 0] == 1 and ends[2, 1] == -1 and ends[3, 1] == 1 and ends[4, 2] == -1 and ends[5, 2] == 1
