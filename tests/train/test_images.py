"""The order of the images follows from seed and step."""

from __future__ import annotations

import numpy as np
import pytest

from fastsd.train.images import RowOrder
from fastsd.train.parts import split


def drawn(order: RowOrder, steps: int, batch: int, parts: int = 2) -> list[list[int]]:
    return [[int(r) for part in split(0, "s", n, batch, parts) for r in order.rows(part)] for n in range(steps)]


def test_every_image_comes_once_in_an_epoch() -> None:
    batches = drawn(RowOrder([np.arange(10)], seed=3), 5, 4)
    flat = np.array(batches).ravel()
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10)) and list(flat[:10]) != list(flat[10:])
    assert batches == drawn(RowOrder([np.arange(10)], seed=3), 5, 4, parts=3)
    assert batches != drawn(RowOrder([np.arange(10)], seed=4), 5, 4)


def test_a_batch_is_of_one_group() -> None:
    groups = [np.arange(5), np.arange(5, 8), np.arange(8, 17)]
    batches = drawn(RowOrder(groups, seed=0), 12, 4)
    for batch in batches:
        assert sum(set(batch) <= set(group.tolist()) for group in groups) == 1 and len(batch) == 4
    # Batches of an epoch: 2, 1 and 3.
    assert {row for batch in batches[:6] for row in batch} == set(range(17))
    assert batches[:6] != batches[6:]


@pytest.mark.parametrize("replacement", [False, True])
def test_what_is_held_out_is_never_trained_on(replacement: bool) -> None:
    order = RowOrder([np.arange(20)], seed=1, held_out=0.2, replacement=replacement, passes=3)
    trained = {row for batch in drawn(order, 200, 8) for row in batch}
    (part,) = split(0, "s", 2**31, 6, 1, validation=True)
    held_out = {int(row) for row in order.rows(part)}
    assert len(held_out) == 4 and held_out < set(range(20))
    assert trained == {row + 20 * copy for row in set(range(20)) - held_out for copy in range(3)}
