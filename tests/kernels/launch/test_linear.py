"""The launches of `linear` and `geglu`."""

from __future__ import annotations

import pytest

from fastsd.kernels.launch.architecture import CLASSES
from fastsd.kernels.launch.linear import TABLE, UNUSED, choose

SHAPES = [  # rows, columns, K of SD1.5 and SDXL, guided, and few rows
    *((8192, 320, 320), (8192, 960, 320), (8192, 320, 1280), (2048, 640, 2560), (512, 1280, 5120), (128, 1280, 1280)),
    *((8192, 640, 640), (2048, 1280, 1280), (2048, 3840, 1280), (2048, 1280, 5120), (154, 1280, 2048), (2, 1280, 320)),
]


def test_every_class_has_launches_or_a_reason() -> None:
    assert {*TABLE, *UNUSED} == set(CLASSES)


@pytest.mark.parametrize("architecture", TABLE)
@pytest.mark.parametrize(("rows", "columns", "depth"), SHAPES)
def test_launches_are_whole(architecture: int, rows: int, columns: int, depth: int) -> None:
    for gated in (0, 1):
        launch = choose(architecture, rows, columns, depth, gated, 2)
        assert launch.tma == (architecture >= 90)
        assert launch.columns == launch.more if gated else launch.more < launch.columns
        # Each part of a split product is long enough to be worth its start.
        assert launch.splits == 1 or depth >= 6 * launch.depth * launch.splits
        # Operands of all stages fit into the shared memory of the class's smallest chip, with a little to spare.
        row_bytes = 2 * launch.depth * (launch.rows + launch.columns + launch.more)
        assert row_bytes * launch.stages <= {80: 163, 86: 98, 90: 220, 100: 220, 120: 98}[architecture] * 1024


def test_tiles_of_160_columns_where_they_fill_a_wave() -> None:
    """2048 x 1280 on an H100's 132 multiprocessors: 16 x 10 tiles of 128 x 128 take two waves, 16 x 8 of 160 one."""
    launch = choose(90, 2048, 1280, 1280, 0, 2)
    assert (launch.columns, launch.more, launch.splits) == (128, 32, 1)


def test_few_rows_are_split() -> None:
    """A map of 8 x 8, guided, has 128 rows: the 40 tiles of 64 x 64 would leave most multiprocessors idle."""
    assert choose(90, 128, 1280, 5120, 0, 2).splits > 1
    assert choose(90, 8192, 320, 320, 0, 2).splits == 1
