"""The distance of fp8 from fp32, and the page that tells it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from bench.families import TINY
from bench.fp8_distance import BEGIN, END, KINDS, PAGE, images, psnr, unet_errors


def test_psnr() -> None:
    black, grey = np.zeros((2, 2)), np.full((2, 2), 255 / 10)
    assert psnr(grey, black) == pytest.approx(20) and math.isinf(psnr(grey, grey))


@pytest.mark.heavy
def test_distances_are_measured() -> None:
    found = images("digits", ("a thick 8",), 1, num_inference_steps=2)
    assert set(found) == set(KINDS) and len({distance for (distance,) in found.values()}) == len(KINDS)
    assert all(20 < distance < 60 for (distance,) in found.values())  # neither another image nor the same
    wide = replace(TINY.unet, block_out_channels=(64, 128), norm_num_groups=16)
    (error, layers, share), (more_error, more_layers, more_share) = unet_errors(wide, 8).values()
    assert 0 < error < 1 and 0 < more_error < 1 and 0 < layers < more_layers and 0 < share < more_share < 1


def test_the_page_has_the_table() -> None:
    text = PAGE.read_text(encoding="utf-8")
    rows = text[text.index(BEGIN) + len(BEGIN) : text.index(END)].splitlines()
    assert len(rows) == 5 and all(row.count("|") == 2 + len(KINDS) for row in rows)
    assert all(row.count("dB") == 4 for row in rows[2:4]) and rows[4].count("relative error") == 2
