"""PSNR and SSIM against known values and torchmetrics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastsd.errors import FastsdError
from fastsd.evaluate.pairs import psnr, ssim


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size=(24, 31, 3), dtype=np.uint8)


def test_psnr_of_a_known_difference() -> None:
    a = np.full((4, 4, 3), 100, np.uint8)
    assert psnr(a, a + 1) == pytest.approx(20 * math.log10(255))  # 48.13 dB
    assert psnr(a, a) == math.inf
    assert psnr(np.zeros_like(a), np.full_like(a, 255)) == 0


def test_ssim_of_equal_flat_and_inverted_images() -> None:
    a = noise(0)
    assert ssim(a, a) == pytest.approx(1, abs=1e-12)
    # Flat images have no variance: (2 u v + c1) / (u^2 + v^2 + c1).
    flat = np.full((16, 16, 3), 50, np.uint8)
    c1 = (0.01 * 255) ** 2
    assert ssim(flat, flat * 2) == pytest.approx((2 * 50 * 100 + c1) / (50**2 + 100**2 + c1))
    assert ssim(a, 255 - a) < 0


@pytest.mark.heavy  # the import of torchmetrics
def test_ssim_agrees_with_torchmetrics() -> None:
    functional = pytest.importorskip("torchmetrics.functional.image")
    a = noise(1)
    b = np.clip(a.astype(int) + np.random.default_rng(2).integers(-30, 30, a.shape), 0, 255).astype(np.uint8)
    x, y = (torch.from_numpy(image).permute(2, 0, 1)[None].double() for image in (a, b))
    theirs = functional.structural_similarity_index_measure(x, y, data_range=255.0, return_full_image=True)[1]
    # Their mean counts windows that reach over the border; the full map without them is ours.
    assert ssim(a, b) == pytest.approx(float(theirs[..., 5:-5, 5:-5].mean()), abs=1e-9)


def test_unequal_or_small_images_are_refused() -> None:
    with pytest.raises(FastsdError, match="different sizes"):
        psnr(noise(0), noise(0)[1:])
    with pytest.raises(FastsdError, match="at least 11"):
        ssim(noise(0)[:8], noise(0)[:8])
