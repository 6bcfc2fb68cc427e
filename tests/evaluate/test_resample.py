"""The bootstrap's interval against the one of theory."""

from __future__ import annotations

import numpy as np
import pytest

from fastsd.evaluate.resample import Figure, bootstrap


def test_the_interval_of_a_mean_is_that_of_the_normal_law() -> None:
    values = np.random.default_rng(0).normal(size=400)
    figure = bootstrap(lambda rows: float(values[rows].mean()), 400, 2000, seed=1)
    error = 1.96 * values.std() / 20
    assert figure.value == pytest.approx(values.mean())
    # 2000 draws place a 2.5 % quantile with a standard error of 0.06 of the deviation: 4 of them, of 1.96.
    assert figure.low == pytest.approx(values.mean() - error, abs=0.13 * error)
    assert figure.high == pytest.approx(values.mean() + error, abs=0.13 * error)


def test_it_repeats_stays_within_a_share_and_may_be_left_out() -> None:
    values = np.array([1.0] * 19 + [0.0])

    def share(rows: np.ndarray) -> float:
        return float(values[rows].mean())

    one = bootstrap(share, 20, 50, seed=3, share=True)
    assert one == bootstrap(share, 20, 50, seed=3, share=True) != bootstrap(share, 20, 50, seed=4, share=True)
    assert one.low is not None and one.high is not None and 0 <= one.low <= one.value <= one.high <= 1
    assert bootstrap(share, 20, 0, seed=3) == Figure(0.95)


def test_a_figure_that_grows_with_repeats_lies_within_its_interval() -> None:
    """The number of different images falls in every draw; the interval is moved to the figure all the same."""
    figure = bootstrap(lambda rows: float(len(set(rows.tolist()))), 100, 200, seed=0)
    assert figure.low is not None and figure.high is not None
    assert figure.low < 100 < figure.high
