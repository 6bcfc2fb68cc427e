"""Which of many steps are shown."""

from __future__ import annotations

import pytest

from fastsd.show.scene import spread


@pytest.mark.parametrize(
    ("count", "most", "chosen"),
    [(4, 60, [0, 1, 2, 3]), (25, 4, [0, 8, 16, 24]), (1, 8, [0]), (5, 1, [0]), (3, 3, [0, 1, 2])],
)
def test_spread(count: int, most: int, chosen: list[int]) -> None:
    assert spread(count, most) == chosen
