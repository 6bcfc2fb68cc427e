"""What the hires fix's second pass starts from: how latents and images are enlarged between the two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fastsd
from fastsd.errors import FastsdError
from fastsd.generate.latents import INTERPOLATION, enlarge
from fastsd.generate.sizes import RESAMPLING
from fastsd.image.infotext import UPSCALERS
from fastsd.parameters import passes
from fastsd.runtime import memory
from tests.support.pipelines import PHOTO, tiny_pipeline
from tests.support.upscalers import write_upscaler

HIRES: dict[str, Any] = {"hires_scale": 1.5, "hires_strength": 0.6}


@pytest.fixture
def upscaler(tmp_path: Path) -> fastsd.Upscaler:
    return fastsd.Upscaler.from_file(write_upscaler(tmp_path / "sharp.safetensors"), device="cpu")


def test_it_is_image_to_image_of_what_the_upscaler_makes(upscaler: fastsd.Upscaler) -> None:
    """Bit for bit, in a batch too; the image says which upscaler it was."""
    pipe = tiny_pipeline()
    arguments: dict[str, Any] = {"seed": 3, "sampler": "euler_a", "num_inference_steps": 5}
    result = pipe(["a cat", "a dog"], batch_size=2, hires_upscaler=upscaler, **HIRES, **arguments)
    small = pipe(["a cat", "a dog"], batch_size=2, **arguments)
    for i, prompt in enumerate(("a cat", "a dog")):
        large = upscaler(small.images[i], size=(96, 96))
        expected = pipe(prompt, image=large, strength=0.6, **(arguments | {"seed": 3 + i})).images[0]
        assert np.array_equal(np.asarray(result.images[i]), np.asarray(expected))
    assert result.parameters["hires_upscaler"] == "sharp"


def test_the_pipeline_loads_it(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    loaded = pipe.load_upscaler(write_upscaler(tmp_path / "sharp.safetensors"))
    assert (loaded.device, loaded.name) == (pipe.device, "sharp")


def test_its_memory_is_checked_before_the_first_pass(
    upscaler: fastsd.Upscaler, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tiny_pipeline()
    monkeypatch.setattr(memory, "check_workload", lambda *_: None)
    monkeypatch.setattr(memory, "available", lambda device: 1000)
    with pytest.raises(FastsdError, match="the result is computed at 128x128"):
        pipe.stream("a cat", hires_upscaler=upscaler, **HIRES)


@pytest.mark.parametrize("wrong", ["bicubic", 3, PHOTO], ids=["a name", "a number", "an image"])
def test_what_enlarges_nothing(wrong: Any) -> None:
    with pytest.raises(FastsdError, match="it should be one of latent, .*, lanczos, nearest, or a fastsd.Upscaler"):
        tiny_pipeline()("a cat", hires_upscaler=wrong, **HIRES)


def test_every_way_to_enlarge_has_its_name_at_a1111() -> None:
    assert passes.LATENT_UPSCALERS == tuple(INTERPOLATION) and passes.IMAGE_UPSCALERS == tuple(RESAMPLING)
    assert list(UPSCALERS) == [*INTERPOLATION, *RESAMPLING]


@pytest.mark.parametrize(
    ("upscaler", "expected"),
    [
        ("latent", [0, 0.5, 1]),
        ("latent-antialiased", [0, 0.5, 1]),  # which changes what is made smaller
        ("latent-bicubic", [-0.0868, 0.5, 1.0868]),  # Keys' kernel with a = -0.75; edges are repeated
        ("latent-bicubic-antialiased", [-0.0658, 0.5, 1.0658]),  # a = -0.5; what lies outside has no weight
        ("latent-nearest", [0, 0, 1]),  # floor(2 i / 3)
        ("latent-nearest-exact", [0, 1, 1]),  # floor(2 (i + 1 / 2) / 3)
    ],
)
def test_two_latents_become_three(upscaler: str, expected: list[float]) -> None:
    column = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1).expand(1, 2, 2, 4)
    found = enlarge(column, 3, 3, upscaler)
    assert found.shape == (1, 3, 3, 4) and found.is_contiguous()
    torch.testing.assert_close(found[0, :, 1, 2], torch.tensor(expected, dtype=torch.float32), rtol=0, atol=1e-4)


def test_the_second_pass_is_that_of_the_way_that_is_asked_for() -> None:
    pipe = tiny_pipeline()
    arguments: dict[str, Any] = {"seed": 3, "sampler": "euler_a", "num_inference_steps": 5}
    made = {name: pipe("a cat", hires_upscaler=name, **HIRES, **arguments) for name in UPSCALERS}
    assert [one.parameters["hires_upscaler"] for one in made.values()] == list(UPSCALERS)
    large = pipe("a cat", **arguments).images[0].resize((96, 96), Image.Resampling.NEAREST)
    expected = pipe("a cat", image=large, strength=0.6, **arguments).images[0]
    assert np.array_equal(np.asarray(made["nearest"].images[0]), np.asarray(expected))
    different = {one.images[0].tobytes() for name, one in made.items() if name != "latent-antialiased"}
    assert len(different) == len(UPSCALERS) - 1
