"""The distance of fp8 from fp32, and the page that tells it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from bench.families import TINY
from bench.fp8_distance import BEGIN, END, PAGE, digits, psnr, unet_error


def test_psnr() -> None:
    black, grey = np.zeros((2, 2)), np.full((2, 2), 255 / 10)
    assert psnr(grey, black) == pytest.approx(20) and math.isinf(psnr(grey, grey))


@pytest.mark.heavy
def test_distances_are_measured() -> None:
    (distance,) = digits(("a thick 8",), 1, num_inference_steps=2)
    assert 20 < distance < 60  # neither another image nor the same
    wide = replace(TINY.unet, block_out_channels=(64, 128), norm_num_groups=16)
    error, layers, share = unet_error(wide, 8)
    assert 0 < error < 1 and layers and 0 < share < 1


def test_the_page_has_the_table() -> None:
    text = PAGE.read_text(encoding="utf-8")
    rows = text[text.index(BEGIN) + len(BEGIN) : text.index(END)].splitlines()
    assert len(rows) == 4 and "dB" in rows[2] and "relative error" in rows[3]
