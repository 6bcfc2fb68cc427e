"""Images are judged by their grey levels, graphs by every bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastsd.kernels.choice.rule import CheckResult
from fastsd.pipeline import Pipeline
from fastsd.verify.images import ImageRun, check_graphs, check_image, compare_graphs, compare_images, psnr

IMAGE_RUN = ImageRun("digits", "cpu", "fp32", "an eight", 2)


def test_images_are_judged_by_grey_levels() -> None:
    truth = np.full((1, 4, 4, 3), 0.5)
    unjudged = CheckResult("image", "image")
    near = compare_images(unjudged, truth + 1 / 255, truth, truth, 1.0, 2.0)
    far = compare_images(unjudged, truth + 2 / 255, truth, truth, 1.0, 2.0)
    like_torch = compare_images(unjudged, truth + 2 / 255, truth + 1 / 255, truth, 1.0, 2.0)
    assert (near.passed, far.passed, like_torch.passed) == (True, False, True)
    assert far.error == pytest.approx(2.0) and far.shape == "1x4x4x3"
    assert (far.seconds, far.torch_seconds) == (1.0, 2.0)
    assert psnr(255.0) == 0 and psnr(0.0) == float("inf")
    assert psnr(1.0) == pytest.approx(48.13, abs=0.01)


def test_the_image_matches_the_specification(pipe: Pipeline) -> None:
    result = check_image(IMAGE_RUN, pipe)
    assert result.passed and result.error is not None and result.error < 0.1


def test_graphs_must_not_change_a_bit() -> None:
    unjudged = CheckResult("graphs", "on and off")
    latent = torch.ones(1, 4, 8, 8)
    same = compare_graphs(unjudged, lambda on: (latent, 1.0))
    different = compare_graphs(unjudged, lambda on: (latent + (1e-7 if on else 0), 1.0))
    assert same.passed is True and different.passed is False
    assert check_graphs(IMAGE_RUN, torch.device("cpu")).passed is None
