"""The checks pass for real digits, and catch a model that draws the wrong ones, few, copies, or ignores style words."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastsd.evaluate.checks import check_diversity, check_novelty, check_reader, check_right, check_style
from fastsd.evaluate.reader import Reader
from fastsd.evaluate.report import as_drawn
from fastsd.evaluate.samples import Drawn
from fastsd.train.digits import Digits, augment, enlarge
from fastsd.train.strokes import measure, styles


@pytest.fixture(scope="module")
def real(some_training: Digits) -> tuple[torch.Tensor, np.ndarray]:
    return as_drawn(some_training, 2000)


def test_real_digits_are_read(reader: Reader, honest: Drawn) -> None:
    assert check_right(reader, honest).passed
    assert check_reader(reader, honest.pictures, honest.digits).passed


def test_wrong_digits_are_caught(reader: Reader, honest: Drawn) -> None:
    """One drawing in twenty shows another digit than asked, all of them where a nine was asked."""
    asked = np.where((np.arange(500) % 20 == 0), (honest.digits + 1) % 10, honest.digits)
    assert not check_right(reader, Drawn(honest.pictures, asked)).passed
    nines = np.where(honest.digits == 4, 9, honest.digits)
    check = check_right(reader, Drawn(honest.pictures, nines))
    assert not check.passed and "worst: 9" in check.figure


def test_nothing_is_not_read_as_everything(reader: Reader, honest: Drawn) -> None:
    blank = Drawn(torch.zeros(500, 64, 64), honest.digits)
    assert check_right(reader, blank).values["share"] < 0.2


def test_real_digits_are_diverse(honest: Drawn, real: tuple[torch.Tensor, np.ndarray]) -> None:
    check = check_diversity(honest, *real)
    assert check.passed
    # Both are the same distribution: about 50 pictures of a digit, spread of a pair's distance about 15 %, ten digits.
    assert check.values["mean"] == pytest.approx(1, abs=0.06)


def test_the_mean_digit_is_caught(honest: Drawn, real: tuple[torch.Tensor, np.ndarray]) -> None:
    """Every drawing pulled half way to its digit's mean: half the distances."""
    mean = torch.stack([honest.pictures[honest.digits == d].mean(0) for d in range(10)])
    pulled = (honest.pictures + mean[honest.digits]) / 2
    assert not check_diversity(Drawn(pulled, honest.digits), *real).passed


def test_few_drawings_again_and_again_are_caught(honest: Drawn, real: tuple[torch.Tensor, np.ndarray]) -> None:
    """Two different pictures of each digit, 25 times each: half of the pairs have no distance."""
    chosen = [np.flatnonzero(honest.digits == d)[k % 2] for d in range(10) for k in range(50)]
    drawn = Drawn(honest.pictures[chosen], np.repeat(np.arange(10), 50))
    assert not check_diversity(drawn, *real).passed


def test_one_shape_at_many_sizes_shows(honest: Drawn, held_out: Digits, real: tuple[torch.Tensor, np.ndarray]) -> None:
    """The plain ratio is fooled in part, the one of shapes alone is not."""
    first = [int(np.flatnonzero(held_out.labels == d)[0]) for d in range(10) for _ in range(30)]
    pictures = augment(held_out.images[first], np.random.default_rng(1), (0.7, 1.15), 0.2)
    check = check_diversity(Drawn(pictures, np.repeat(np.arange(10), 30)), *real)
    assert check.values["shapes_mean"] < 0.4 < check.values["mean"]


def test_real_digits_are_new(honest: Drawn, training_shapes: torch.Tensor, held_out: Digits) -> None:
    assert check_novelty(honest, training_shapes, enlarge(held_out.images[500:800])).passed


@pytest.mark.parametrize("blur", [1, 3], ids=["sharp", "blurred"])
def test_copies_are_caught(
    blur: int, honest: Drawn, some_training: Digits, training_shapes: torch.Tensor, held_out: Digits
) -> None:
    """Training pictures at other sizes and slants, blurred as by an autoencoder or not; and one among real ones."""
    others = enlarge(held_out.images[500:800])
    copies = augment(some_training.images[:500], np.random.default_rng(2), (0.7, 1.15), 0.2)
    copies = torch.nn.functional.avg_pool2d(copies[:, None], blur, stride=1, padding=blur // 2)[:, 0]
    all_copied = check_novelty(Drawn(copies, some_training.labels[:500].astype(np.int64)), training_shapes, others)
    assert not all_copied.passed and all_copied.values["median"] < 0.5
    one = honest.pictures.clone()
    one[7] = copies[7]
    assert not check_novelty(Drawn(one, honest.digits), training_shapes, others).passed


@pytest.mark.parametrize("column, name", [(0, "thickness"), (1, "slant"), (2, "size")])
def test_style_words(column: int, name: str, real: tuple[torch.Tensor, np.ndarray]) -> None:
    """Pictures that deserve the words pass; the words swapped, ignored, or followed to a third do not."""
    pictures, labels = real
    ends = styles(measure(pictures.numpy()), labels, 0.27)[:, column]

    def some(end: int, digit: int) -> np.ndarray:
        return np.flatnonzero((labels == digit) & (ends == end))[:20]

    low_rows = np.concatenate([some(-1, d) for d in range(10)])
    high_rows = np.concatenate([some(1, d) for d in range(10)])
    digits = np.repeat(np.arange(10), 20)
    low, high = Drawn(pictures[low_rows], digits), Drawn(pictures[high_rows], digits)
    values = getattr(measure(pictures.numpy()), name)
    effect = float((values[high_rows] - values[low_rows]).mean())

    assert check_style(name, low, high, effect).passed
    assert not check_style(name, high, low, effect).passed
    order = np.random.default_rng(0).permutation(200)
    assert not check_style(name, low, Drawn(low.pictures[order], digits), effect).passed
    mixed = Drawn(torch.where((torch.arange(200) % 3 == 0)[:, None, None], high.pictures, low.pictures), digits)
    weak = check_style(name, low, mixed, effect)
    assert weak.values["drawn"] > 3 * weak.values["error"] and not weak.passed
