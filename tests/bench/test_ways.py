"""Peers draw the same picture in every other way: the same noise, steps and pixels compared, in each precision."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bench import bench_ways as ways
from bench.families import SDXL, TINY
from bench.models import random_components
from bench.session import Session, check_options
from fastsd.components import Components
from fastsd.generate.latents import InpaintMask, Noise

CPU = torch.device("cpu")
NOTHING: dict[str, Any] = dict.fromkeys(
    ["models", "batch", "size", "steps", "dtype", "peers", "budget", "model", "results", "profile", "benchmark"]
)


@pytest.fixture(scope="module")
def session() -> Session:
    """A check of the tiny model with all of diffusers' candidates."""
    found = Session(check_options(NOTHING))
    found.options = replace(found.options, peers=("diffusers", "diffusers-compiled"), steps=(6,))
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["img2img", "inpaint", *ways.FEW])
def test_diffusers_passes_the_gate(session: Session, kind: str, dtype: torch.dtype) -> None:
    pytest.importorskip("diffusers")
    session.tables.clear()
    ways.bench_ways(session, lambda outcomes: None, "tiny", kind, dtype)
    _, own, theirs, compiled = session.tables[0].splitlines()
    assert "checked" in own and "not run" in compiled
    if kind == "lcm" and dtype != torch.float32:
        assert "not comparable" in theirs and "16 bits" in theirs
    else:
        assert "checked" in theirs


def test_another_seed_would_not_pass(session: Session, monkeypatch: Any) -> None:
    pytest.importorskip("diffusers")
    session.tables.clear()
    right = ways.noise_of
    monkeypatch.setattr(ways, "noise_of", lambda seed, components, size, skip=0: right(99, components, size))
    ways.bench_ways(session, lambda outcomes: None, "tiny", "inpaint", torch.float32)
    assert "red gate" in session.tables[0].splitlines()[2]


def test_what_is_compared_of_an_inpainting_is_all_painted_anew() -> None:
    for size in (64, 512):
        how = ways.way("inpaint", size, 6)
        assert how.inside is not None
        fade = np.asarray(InpaintMask.from_image(how.arguments["mask_image"], 8).feathered)
        inside = fade[how.inside, how.inside]
        assert inside.size > 0 and (inside == 255).all()


def test_noise_is_the_pipelines_own() -> None:
    components: Components = random_components(TINY, torch.float32, CPU)
    drawn = Noise([5], 4, 8, 8, CPU)
    for skip in range(2):
        assert torch.equal(drawn.draw().permute(0, 3, 1, 2), ways.noise_of(5, components, 64, skip))


def test_what_is_not_compared_says_why() -> None:
    two: Any = SimpleNamespace(text_encoders=SDXL.text)
    assert "only Stable Diffusion 1 and 2" in ways.incomparable(ways.way("img2img", 64, 6), two, torch.float32)
    assert ways.incomparable(ways.way("turbo", 64, 6), two, torch.bfloat16) == ""
