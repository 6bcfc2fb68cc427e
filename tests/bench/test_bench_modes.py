"""In every mode diffusers generates the same image: same noise, steps and compared pixels, in each precision."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bench import bench_modes as modes
from bench import options
from bench.families import SDXL, TINY
from bench.models import random_components
from bench.session import Session
from fastsd.components import Components
from fastsd.generate.noise import Noise, NoisePlan

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def session() -> Session:
    """A check of the tiny model, with all candidates of diffusers."""
    return Session(replace(options.parse(), peers=("diffusers", "diffusers-compiled"), steps=(6,)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", modes.MODES)
def test_diffusers_passes_the_correctness_check(session: Session, name: str, dtype: torch.dtype) -> None:
    pytest.importorskip("diffusers")
    session.tables.clear()
    modes.bench_mode(session, lambda outcomes: None, "tiny", name, dtype)
    _, own, theirs, compiled = session.tables[0].splitlines()
    assert "checked" in own and "not run" in compiled
    if name == "lcm" and dtype != torch.float32:
        assert "not comparable" in theirs and "16 bits" in theirs
    else:
        assert "checked" in theirs


def test_another_seed_fails_the_correctness_check(session: Session, monkeypatch: Any) -> None:
    pytest.importorskip("diffusers")
    session.tables.clear()
    sample_noise = modes.sample_noise
    other = lambda seed, components, size, skip=0: sample_noise(99, components, size)  # noqa: E731
    monkeypatch.setattr(modes, "sample_noise", other)
    modes.bench_mode(session, lambda outcomes: None, "tiny", "inpaint", torch.float32)
    assert "correctness check failed" in session.tables[0].splitlines()[2]


def test_the_compared_pixels_of_an_inpainting_are_inside_the_mask() -> None:
    for size in (64, 512):
        mode = modes.make_mode("inpaint", size, 6)
        assert mode.compared is not None
        mask = np.asarray(mode.arguments["mask_image"])
        compared = mask[mode.compared, mode.compared]
        assert compared.size > 0 and (compared == 255).all()


def test_the_noise_is_that_of_the_pipeline() -> None:
    components: Components = random_components(TINY, torch.float32, CPU)
    noise = Noise(NoisePlan("cpu", (5,)), slice(0, 1), 4, 8, 8, CPU)
    for skip in range(2):
        assert torch.equal(noise.sample().permute(0, 3, 1, 2), modes.sample_noise(5, components, 64, skip))


def test_a_mode_that_is_not_compared_has_a_reason() -> None:
    sdxl: Any = SimpleNamespace(text_encoders=SDXL.text)
    img2img, turbo = (modes.make_mode(name, 64, 6) for name in ("img2img", "turbo"))
    assert "Stable Diffusion 1 and 2 only" in modes.why_not_comparable(img2img, sdxl, torch.float32)
    assert modes.why_not_comparable(turbo, sdxl, torch.bfloat16) == ""
