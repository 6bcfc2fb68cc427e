"""The measures against direct computations, and the changes that must not affect them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastsd.evaluate.digits.measures import (
    NOT_INK,
    canonical,
    effect,
    nearest,
    novelty,
    pairwise_distance,
    real_effects,
)
from fastsd.evaluate.digits.report import augmented
from fastsd.train.digits import Digits, enlarge
from fastsd.train.settings import DigitsData
from fastsd.train.strokes import STYLE_WORDS


def test_pairwise_distance_is_the_mean_over_pairs() -> None:
    images = torch.zeros(3, 2, 2)
    images[1, 0, 0], images[2, 1, 1] = 3.0, 4.0
    assert pairwise_distance(images) == pytest.approx((3 + 4 + 5) / 3, rel=1e-12)


def test_nearest_matches_all_distances() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(700, 40, generator=generator)
    queries = torch.cat([torch.rand(600, 40, generator=generator), base[5:6] + 1e-4])  # more than one block
    table = torch.cdist(queries.double(), base.double())
    distance, index = nearest(queries, base)
    assert torch.equal(index, table.argmin(1))
    # fp32 rounding of 40 squares; the formula with the matrix product would cancel.
    torch.testing.assert_close(distance.double(), table.amin(1), rtol=1e-5, atol=0)
    distance, index = nearest(base[:9], base, skip_first=True)
    assert (index != torch.arange(9)).all() and (distance > 0).all()


def test_canonical_removes_size_slant_and_position(training_subset: Digits) -> None:
    """They change the canonical form far less than the difference between two images of the same digit.

    Resampling remains, and the contrast of `enlarge`, which makes small strokes relatively bolder.
    """
    images = training_subset.images[:200]
    plain = canonical(enlarge(images))
    moved = torch.roll(enlarge(images, 0.75, 0.2), (3, -4), dims=(1, 2))
    same = (canonical(moved) - plain).flatten(1).norm(dim=1)
    labels = torch.from_numpy(training_subset.labels[:200].astype(np.int64))
    table = torch.cdist(plain.flatten(1), plain.flatten(1))
    table[(labels[:, None] != labels) | torch.eye(200, dtype=torch.bool)] = torch.nan
    between = table.nanmedian(dim=1).values
    assert (same / between).median() < 0.25
    assert (same / between).max() < 0.6


def test_canonical_of_an_empty_image_is_empty() -> None:
    assert torch.equal(canonical(torch.zeros(1, 64, 64)), torch.zeros(1, 32, 32))


def test_haze_does_not_change_the_canonical_form(training_subset: Digits) -> None:
    """The decoder's black is not exactly 0. Grey below `NOT_INK` is ignored."""
    images = enlarge(training_subset.images[:20])
    assert (canonical(images.clamp_min(0.8 * NOT_INK)) - canonical(images)).abs().max() < 1e-5


def test_copies_are_not_novel(training_shapes: torch.Tensor) -> None:
    """A copy has novelty 0; real digits outside the set have a median of about 1."""
    base = training_shapes[:2000]
    assert novelty(base[:50], base).max() < 1e-3
    assert 0.9 < np.median(novelty(training_shapes[2000:2300], base)) < 1.3


def test_effect_is_the_paired_difference() -> None:
    shift = effect(np.array([1.0, 2.0, 3.0, 4.0]), np.array([2.0, 4.0, 4.0, 6.0]), real=3.0)
    assert shift.generated == pytest.approx(1.5)
    assert shift.error == pytest.approx(np.std([1, 2, 1, 2], ddof=1) / 2)


def test_real_effects_are_differences_within_a_digit() -> None:
    """Two "digits" of bars, one of them twice as wide: the effect compares bars of one digit only.

    A bar of width w and height h, its upper half shifted right by k, has area w h, outline 2 (w + h + k) and thickness
    2 area / outline / h. With a share of 0.25, the thinnest of four bars is `thin` and the widest `thick`.
    """
    bars = [(2, 34, 0), (3, 36, 1), (4, 38, 2), (5, 40, 3)]  # w, h, k
    bars += [(2 * w, h, k) for w, h, k in bars]
    images = torch.zeros(8, 64, 64)
    for image, (w, h, k) in zip(images, bars):
        image[12 : 12 + h // 2, 20 + k : 20 + k + w] = 1
        image[12 + h // 2 : 12 + h, 20 : 20 + w] = 1
    effects = real_effects(images, np.array([0] * 4 + [1] * 4), 0.25)

    thickness = [w / (w + h + k) for w, h, k in bars]
    # The measured outline cuts eight corners by 2 - sqrt 2 pixels each, out of some 80 pixels.
    expected = (thickness[3] - thickness[0] + thickness[7] - thickness[4]) / 2
    assert effects["thickness"] == pytest.approx(expected, rel=0.08)
    assert effects["size"] == 6


def test_every_style_word_has_an_effect_in_real_images(training_subset: Digits) -> None:
    effects = real_effects(*augmented(training_subset, 2000), DigitsData.style_share)
    assert effects.keys() == STYLE_WORDS.keys()
    assert all(value > 0 for value in effects.values())
