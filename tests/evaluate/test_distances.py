"""The distances against closed forms, against hand-made sets, and against torchmetrics."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastsd.errors import FastsdError
from fastsd.evaluate.distances import (
    KernelDistance,
    PrecisionRecall,
    frechet_distance,
    inception_score,
    moments,
    moments_of,
    squared_distances,
)


def gaussian(count: int, mean: np.ndarray, covariance: np.ndarray, seed: int) -> np.ndarray:
    """`[count, D]` whose sample mean and unbiased sample covariance are these, to rounding."""
    raw = np.random.default_rng(seed).normal(size=(count, len(mean)))
    raw -= raw.mean(0)
    white = np.linalg.solve(np.linalg.cholesky(np.cov(raw.T)), raw.T)
    return (np.linalg.cholesky(covariance) @ white).T + mean


def test_fid_of_two_gaussians_is_the_closed_form() -> None:
    """Covariances with the same axes: |shift|^2 + sum (sigma_a - sigma_b)^2."""
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0]
    a, b = np.array([4.0, 1, 9, 0.25, 2, 1]), np.array([1.0, 1, 4, 4, 0.5, 16])
    shift = np.arange(6.0)
    x = gaussian(200, np.zeros(6), turn @ np.diag(a) @ turn.T, 1)
    y = gaussian(77, shift, turn @ np.diag(b) @ turn.T, 2)
    expected = (shift**2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert abs(frechet_distance(moments(x), moments(y)) - expected) < 1e-6
    from_parameters = moments_of(np.zeros(6), turn @ np.diag(a) @ turn.T), moments_of(shift, turn @ np.diag(b) @ turn.T)
    assert abs(frechet_distance(*from_parameters) - expected) < 1e-6


@pytest.mark.parametrize("count", [20, 300], ids=["fewer images than features", "more"])
def test_fid_of_a_set_with_itself_is_zero(count: int) -> None:
    x = np.random.default_rng(3).normal(size=(count, 128)) * 40
    assert abs(frechet_distance(moments(x), moments(x))) < 1e-6
    assert frechet_distance(moments(x), moments(x + 1)) == pytest.approx(128, abs=1e-6)


@pytest.mark.heavy  # the import of torchmetrics
def test_fid_agrees_with_torchmetrics() -> None:
    """Which takes the root of the product by its eigenvalues, in float64."""
    image = pytest.importorskip("torchmetrics.image.fid")
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(120, 3, 4, 4, generator=generator), torch.rand(90, 3, 4, 4, generator=generator) ** 2
    flat = torch.nn.Flatten()
    flat.num_features = 48  # type: ignore[assignment]
    theirs = image.FrechetInceptionDistance(feature=flat, normalize=True, input_img_size=(3, 4, 4)).set_dtype(
        torch.float64
    )
    theirs.used_custom_model = True
    theirs.update(y, real=True)
    theirs.update(x, real=False)
    ours = frechet_distance(moments(x.flatten(1).double().numpy()), moments(y.flatten(1).double().numpy()))
    # Both are in float64. Theirs sums 48 roots of eigenvalues below 1, each of which may lose half of its 52 bits.
    assert ours == pytest.approx(float(theirs.compute()), abs=48 * 2**-26)


def test_kid_is_the_unbiased_estimate() -> None:
    """Of two samples of one distribution the mean is 0; and by hand for three points."""
    generator = np.random.default_rng(0)
    values = np.array([KernelDistance(*generator.normal(size=(2, 20, 8)))() for _ in range(300)])
    assert abs(values.mean()) < 4 * values.std() / np.sqrt(300)
    assert values.min() < 0 < values.max()
    x, y = np.array([[0.0], [1.0]]), np.array([[2.0], [3.0]])
    # k(u, v) = (uv + 1)^3: of x 1; of y 7^3; across (1 + 1 + 27 + 64) / 4.
    assert KernelDistance(x, y)() == pytest.approx(1 + 343 - 2 * 93 / 4)


def test_kid_counts_no_image_with_itself() -> None:
    """A repeated image adds no pair of itself, whose kernel would be far too large."""
    x, y = np.random.default_rng(1).normal(size=(2, 12, 5))
    rows = np.array([0, 0, 0, 1, 2, 3])
    kernel = (x @ x.T / 5 + 1) ** 3
    pairs = [kernel[i, j] for a, i in enumerate(rows) for b, j in enumerate(rows) if i != j]
    rest = KernelDistance(x, y)(rows) - (KernelDistance(x, y)() - _mean_pairs(kernel) + 2 * _across(x, y, range(12)))
    assert rest == pytest.approx(np.mean(pairs) - 2 * _across(x, y, rows))


def _mean_pairs(kernel: np.ndarray) -> float:
    count = len(kernel)
    return float((kernel.sum() - kernel.trace()) / (count * (count - 1)))


def _across(x: np.ndarray, y: np.ndarray, rows: object) -> float:
    return float(((x @ y.T / x.shape[1] + 1) ** 3).mean(1)[list(rows)].mean())  # type: ignore[call-overload]


@pytest.mark.heavy
def test_kid_agrees_with_torchmetrics() -> None:
    image = pytest.importorskip("torchmetrics.image.kid")
    x, y = np.random.default_rng(2).normal(size=(2, 30, 16))
    theirs = image.poly_mmd(torch.from_numpy(x), torch.from_numpy(y))
    assert KernelDistance(x, y)() == pytest.approx(float(theirs), rel=1e-12)


def test_is_of_a_uniform_predictor_is_one() -> None:
    assert inception_score(np.full((50, 7), 1 / 7)) == pytest.approx(1, abs=1e-12)


def test_is_of_a_sure_predictor_is_the_number_of_classes() -> None:
    assert inception_score(np.tile(np.eye(5), (4, 1)), splits=4) == pytest.approx(5, rel=1e-12)
    with pytest.raises(FastsdError, match="at least 10"):
        inception_score(np.eye(5))


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore:::torchmetrics")
def test_is_agrees_with_torchmetrics() -> None:
    """On the same order of images; theirs are shuffled, so one part is compared."""
    image = pytest.importorskip("torchmetrics.image.inception")
    logits = torch.randn(40, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    metric = image.InceptionScore(feature=torch.nn.Identity(), splits=1)
    metric.features.append(logits)
    mean, _ = metric.compute()
    assert inception_score(logits.softmax(1).numpy(), splits=1) == pytest.approx(float(mean), rel=1e-12)


def test_precision_and_recall_by_hand() -> None:
    """Points on a line, k = 1: each ball reaches the nearest other point of its set."""
    y = np.array([[0.0], [1.0], [10.0], [12.0]])  # balls [-1, 1], [0, 2], [8, 12], [10, 14]
    x = np.array([[0.5], [13.0], [5.0], [5.5]])  # the first two within; balls [-4, 5], [5.5, 20.5], [4.5, 5.5] x 2
    found = PrecisionRecall(x, y, k=1)
    assert found.precision() == 0.5
    assert found.recall() == 1.0
    assert found.precision(np.array([0, 0, 0, 2])) == 0.75
    # Of 5 and 5.5 alone: balls [4.5, 5.5] and [5, 6] hold no real image.
    assert found.recall(np.array([2, 3, 3, 3])) == 0.0
    with pytest.raises(FastsdError, match="more than 3"):
        PrecisionRecall(x[:3], y)


def test_equal_rows_are_at_distance_zero() -> None:
    u = np.random.default_rng(5).normal(size=(30, 64)) * 1e3
    found = squared_distances(u, u[::-1])
    assert (found[np.arange(30), np.arange(30)[::-1]] == 0).all()
    exact = ((u[:, None] - u[::-1][None]) ** 2).sum(-1)
    np.testing.assert_allclose(found, exact, rtol=1e-9)
