"""Marks and curves of the plots."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fastsd.image.drawing import LIGHT
from fastsd.show.plot import Axis, Line, Strip, log_marks, nice_marks, plot, spelled, strips


@pytest.mark.parametrize(
    ("low", "high", "marks"),
    [
        (0, 1000, [0, 200, 400, 600, 800, 1000]),
        (-3, 3, [-2, 0, 2]),
        (0, 0.5, [0, 0.1, 0.2, 0.3, 0.4, 0.5]),
        (2, 2, [2]),
    ],
)
def test_round_marks(low: float, high: float, marks: list[float]) -> None:
    assert nice_marks(low, high) == pytest.approx(marks)


def test_marks_of_a_logarithmic_axis() -> None:
    assert log_marks(0.02, 150) == pytest.approx([0.1, 1, 10, 100])
    assert log_marks(1e-9, 1e6)[1] / log_marks(1e-9, 1e6)[0] > 10
    assert [spelled(value) for value in (0, 0.5, 1000, 2e-5, 1e6)] == ["0", "0.5", "1000", "2e-5", "1e6"]


def test_a_line_rises_from_left_to_right() -> None:
    """y = x runs from the lower left to the upper right of the frame; infinite points are left out."""
    line = Line("", [0, 1, 2, 3], [0, 1, 2, math.inf])
    pixels = np.asarray(plot([line], Axis("x", 0, 2), Axis("y", 0, 2), "a line"), int)
    rows, columns = np.nonzero(np.abs(pixels - LIGHT.lines[0]).sum(-1) < 30)
    assert columns.max() - columns.min() > 400 and rows.max() - rows.min() > 200
    assert np.corrcoef(columns, rows)[0, 1] < -0.99


def test_dots_stand_at_their_values() -> None:
    found = strips([Strip("a", [1, 10, 100]), Strip("b", [10], [True])], Axis("x", log=True), "dots", 400)
    pixels = np.asarray(found, int)
    columns = np.nonzero(np.abs(pixels[48] - LIGHT.lines[0]).sum(-1) < 30)[0]
    groups = np.split(columns, np.nonzero(np.diff(columns) > 3)[0] + 1)
    middles = [group.mean() for group in groups]
    assert len(middles) == 3 and middles[1] - middles[0] == pytest.approx(middles[2] - middles[1], abs=1.5)
    assert (np.abs(pixels[67] - LIGHT.lines[1]).sum(-1) < 60).any(), "the second row's ring"
