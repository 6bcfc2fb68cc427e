"""The measures against plain computations of the same, and what they must not notice."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastsd.evaluate.measures import canonical, effect, nearest, novelty, pairwise_distance, real_effects
from fastsd.evaluate.report import as_drawn
from fastsd.train.digits import Digits, enlarge


def test_pairwise_distance_is_the_mean_over_pairs() -> None:
    pictures = torch.zeros(3, 2, 2)
    pictures[1, 0, 0], pictures[2, 1, 1] = 3.0, 4.0
    assert pairwise_distance(pictures) == pytest.approx((3 + 4 + 5) / 3, rel=1e-12)


def test_nearest_is_what_comparing_with_every_picture_finds() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(700, 40, generator=generator)
    queries = torch.cat([torch.rand(600, 40, generator=generator), base[5:6] + 1e-4])  # more than one block
    table = torch.cdist(queries.double(), base.double())
    distance, index = nearest(queries, base)
    assert torch.equal(index, table.argmin(1))
    # Directly computed: fp32 rounding of 40 squares, not the cancellation of the matrix product's formula.
    torch.testing.assert_close(distance.double(), table.amin(1), rtol=1e-5, atol=0)
    own, other = nearest(base[:9], base, skip_first=True)
    assert (other != torch.arange(9)).all() and (own > 0).all()


def test_canonical_undoes_what_enlarging_does(some_training: Digits) -> None:
    """Size, slant and place of a picture change its canonical form far less than another picture of the same digit.

    What stays is resampling, and the contrast that `enlarge` adds, which makes small strokes relatively bolder.
    """
    images = some_training.images[:200]
    plain = canonical(enlarge(images))
    moved = torch.roll(enlarge(images, 0.75, 0.2), (3, -4), dims=(1, 2))
    same = (canonical(moved) - plain).flatten(1).norm(dim=1)
    labels = torch.from_numpy(some_training.labels[:200].astype(np.int64))
    table = torch.cdist(plain.flatten(1), plain.flatten(1))
    table[(labels[:, None] != labels) | torch.eye(200, dtype=torch.bool)] = torch.nan
    between = table.nanmedian(dim=1).values
    assert (same / between).median() < 0.25
    assert (same / between).max() < 0.6


def test_canonical_of_nothing_is_nothing() -> None:
    assert torch.equal(canonical(torch.zeros(1, 64, 64)), torch.zeros(1, 32, 32))


def test_haze_does_not_move_a_digit(some_training: Digits) -> None:
    """A decoder's black is not quite black; grey of 0.08 everywhere changes no canonical pixel by more than itself."""
    pictures = enlarge(some_training.images[:20])
    assert (canonical(pictures.clamp_min(0.08)) - canonical(pictures)).abs().max() < 1e-5


def test_copies_are_not_new(some_training: Digits, training_shapes: torch.Tensor) -> None:
    """A copy itself has novelty 0; each real training picture, left out of the set, has about what real ones have."""
    base = training_shapes[:2000]
    assert novelty(base[:50], base).max() < 1e-3
    assert 0.9 < np.median(novelty(training_shapes[2000:2300], base)) < 1.3


def test_effect_is_the_paired_difference() -> None:
    found = effect(np.array([1.0, 2.0, 3.0, 4.0]), np.array([2.0, 4.0, 4.0, 6.0]), real=3.0)
    assert found.drawn == pytest.approx(1.5)
    assert found.error == pytest.approx(np.std([1, 2, 1, 2], ddof=1) / 2)


def test_real_effects_are_differences_within_a_digit() -> None:
    """Two digits of bars, one twice as wide throughout: the effect is of the widths in each, not between them.

    A bar w wide and h high, its upper half k to the right, has area w h, outline 2 (w + h + k) and thickness
    2 area / outline / h. With a share of 0.25, of four bars the thinnest is `thin` and the widest `thick`.
    """
    bars = [(2, 34, 0), (3, 36, 1), (4, 38, 2), (5, 40, 3)]  # w, h, k
    bars += [(2 * w, h, k) for w, h, k in bars]
    pictures = torch.zeros(8, 64, 64)
    for picture, (w, h, k) in zip(pictures, bars):
        picture[12 : 12 + h // 2, 20 + k : 20 + k + w] = 1
        picture[12 + h // 2 : 12 + h, 20 : 20 + w] = 1
    found = real_effects(pictures, np.array([0] * 4 + [1] * 4), 0.25)

    thickness = [w / (w + h + k) for w, h, k in bars]
    # The measured outline cuts eight corners, 2 - sqrt 2 pixels each, of some 80 pixels.
    expected = (thickness[3] - thickness[0] + thickness[7] - thickness[4]) / 2
    assert found["thickness"] == pytest.approx(expected, rel=0.08)
    assert found["size"] == 6


def test_real_words_describe_real_pictures(some_training: Digits) -> None:
    pictures, labels = as_drawn(some_training, 2000)
    found = real_effects(pictures, labels, 0.27)
    assert set(found) == {"thickness", "slant", "size"}
    assert all(value > 0 for value in found.values())
