"""The checks pass for real digits, and fail for wrong, uniform, copied or unstyled ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastsd.evaluate.digits.checks import check_correct, check_diversity, check_novelty, check_reader, check_style
from fastsd.evaluate.digits.reader import DigitReader
from fastsd.evaluate.digits.report import augmented
from fastsd.evaluate.digits.samples import GeneratedDigits
from fastsd.train.digits import Digits, augment, enlarge
from fastsd.train.settings import DigitsData
from fastsd.train.strokes import STYLE_WORDS, measure, styles

Labelled = tuple[torch.Tensor, np.ndarray]

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def real(training_subset: Digits) -> Labelled:
    return augmented(training_subset, 2000)


def test_real_digits_are_read(reader: DigitReader, perfect: GeneratedDigits) -> None:
    assert check_correct(reader, perfect).passed
    assert check_reader(reader, perfect.images, perfect.digits).passed


def test_wrong_digits_fail(reader: DigitReader, perfect: GeneratedDigits) -> None:
    """One image in twenty shows another digit than prompted; then every prompt for a nine gives a four."""
    prompted = np.where((np.arange(500) % 20 == 0), (perfect.digits + 1) % 10, perfect.digits)
    assert not check_correct(reader, GeneratedDigits(perfect.images, prompted)).passed
    nines = np.where(perfect.digits == 4, 9, perfect.digits)
    check = check_correct(reader, GeneratedDigits(perfect.images, nines))
    assert not check.passed and "worst: 9" in check.figure


def test_blank_images_are_not_read_as_prompted(reader: DigitReader, perfect: GeneratedDigits) -> None:
    blank = GeneratedDigits(torch.zeros(500, 64, 64), perfect.digits)
    assert check_correct(reader, blank).values["share"] < 0.2


def test_real_digits_are_diverse(perfect: GeneratedDigits, real: Labelled) -> None:
    check = check_diversity(perfect, *real)
    assert check.passed
    # Both have the same distribution: about 50 images of each of ten digits; distances of pairs vary by about 15 %.
    assert check.values["mean"] == pytest.approx(1, abs=0.06)


def test_images_near_the_mean_digit_fail(perfect: GeneratedDigits, real: Labelled) -> None:
    """Every image is moved half way to the mean of its digit, which halves the distances."""
    mean = torch.stack([perfect.images[perfect.digits == d].mean(0) for d in range(10)])
    averaged = (perfect.images + mean[perfect.digits]) / 2
    assert not check_diversity(GeneratedDigits(averaged, perfect.digits), *real).passed


def test_repeated_images_fail(perfect: GeneratedDigits, real: Labelled) -> None:
    """Two different images of each digit, 25 times each: half of the pairs have distance zero."""
    chosen = [np.flatnonzero(perfect.digits == d)[k % 2] for d in range(10) for k in range(50)]
    repeated = GeneratedDigits(perfect.images[chosen], np.repeat(np.arange(10), 50))
    assert not check_diversity(repeated, *real).passed


def test_the_shape_ratio_exposes_one_shape_at_many_sizes(held_out: Digits, real: Labelled) -> None:
    """The plain ratio rises with the sizes; the ratio of the shapes does not."""
    first = [int(np.flatnonzero(held_out.labels == d)[0]) for d in range(10) for _ in range(30)]
    images = augment(held_out.images[first], np.random.default_rng(1), DigitsData.scales, DigitsData.shear)
    check = check_diversity(GeneratedDigits(images, np.repeat(np.arange(10), 30)), *real)
    assert check.values["shapes_mean"] < 0.4 < check.values["mean"]


def test_real_digits_are_novel(perfect: GeneratedDigits, training_shapes: torch.Tensor, held_out: Digits) -> None:
    assert check_novelty(perfect, training_shapes, enlarge(held_out.images[500:800])).passed


@pytest.mark.parametrize("blur", [1, 3], ids=["sharp", "blurred"])
def test_copies_fail(
    blur: int,
    perfect: GeneratedDigits,
    training_subset: Digits,
    training_shapes: torch.Tensor,
    held_out: Digits,
) -> None:
    """Training images at other sizes and slants, sharp or blurred as by an autoencoder; then one among real digits."""
    others = enlarge(held_out.images[500:800])
    copies = augment(training_subset.images[:500], np.random.default_rng(2), DigitsData.scales, DigitsData.shear)
    copies = torch.nn.functional.avg_pool2d(copies[:, None], blur, stride=1, padding=blur // 2)[:, 0]
    copied = GeneratedDigits(copies, training_subset.labels[:500].astype(np.int64))
    all_copied = check_novelty(copied, training_shapes, others)
    assert not all_copied.passed and all_copied.values["median"] < 0.5
    one_copied = perfect.images.clone()
    one_copied[7] = copies[7]
    assert not check_novelty(GeneratedDigits(one_copied, perfect.digits), training_shapes, others).passed


@pytest.mark.parametrize("name", STYLE_WORDS)
def test_style_words(name: str, real: Labelled) -> None:
    """Images that match the words pass; swapped, ignored or partly followed words fail."""
    images, labels = real
    ends = styles(measure(images.numpy()), labels, DigitsData.style_share)[:, list(STYLE_WORDS).index(name)]

    def select(end: int, digit: int) -> np.ndarray:
        return np.flatnonzero((labels == digit) & (ends == end))[:20]

    low_rows = np.concatenate([select(-1, d) for d in range(10)])
    high_rows = np.concatenate([select(1, d) for d in range(10)])
    digits = np.repeat(np.arange(10), 20)
    low, high = GeneratedDigits(images[low_rows], digits), GeneratedDigits(images[high_rows], digits)
    values = getattr(measure(images.numpy()), name)
    effect = float((values[high_rows] - values[low_rows]).mean())

    assert check_style(name, low, high, effect).passed
    assert not check_style(name, high, low, effect).passed
    order = np.random.default_rng(0).permutation(200)
    assert not check_style(name, low, GeneratedDigits(low.images[order], digits), effect).passed
    third = (torch.arange(200) % 3 == 0)[:, None, None]
    weak = check_style(name, low, GeneratedDigits(torch.where(third, high.images, low.images), digits), effect)
    assert weak.values["drawn"] > 3 * weak.values["error"] and not weak.passed
