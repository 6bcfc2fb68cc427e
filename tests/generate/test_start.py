"""What the hires fix's second pass starts from, where an upscaler enlarges between the two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastsd
from fastsd.errors import FastsdError
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
    with pytest.raises(FastsdError, match="it should be one of latent, lanczos, or a fastsd.Upscaler"):
        tiny_pipeline()("a cat", hires_upscaler=wrong, **HIRES)
