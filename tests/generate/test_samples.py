"""Guidance in an interval of the steps: which samples run in each row, eagerly and with graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastsd import FastsdError, Pipeline
from tests.support import tiny
from tests.support.pipelines import MASK, PHOTO, graphed_pipeline, latents, tiny_pipeline

INTERVAL: dict[str, Any] = {"num_inference_steps": 5, "guidance_start": 0.2, "guidance_end": 0.6}


def counted(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, **arguments: Any) -> list[int]:
    """How many samples every call of the UNet got."""
    calls: list[int] = []
    unet, denoise = pipe.components.unet, pipe.components.unet.denoise

    def counting(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        calls.append(len(x))
        return denoise(x, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(unet, "denoise", counting)
        latents(pipe, **arguments)
    return calls


ROWS: dict[str, tuple[dict[str, Any], list[int]]] = {
    "two of five steps": ({}, [1, 2, 2, 1, 1]),
    "from the start": ({"guidance_start": 0.0}, [2, 2, 2, 1, 1]),
    "to the end": ({"guidance_end": 1.0}, [1, 2, 2, 2, 2]),
    "both calls of a step": ({"sampler": "heun"}, [1, 1, 2, 2, 2, 2, 1, 1, 1]),
    "the steps that run": (
        {"image": PHOTO, "strength": 0.6, "guidance_start": 0.4, "guidance_end": 1.0},
        [1, 1, 2],
    ),
    "three images": ({"num_images_per_prompt": 3}, [3, 6, 6, 3, 3]),
    "one of two images": ({"guidance_scale": [2.0, 1.0], "num_images_per_prompt": 2}, [1, 2, 2, 1, 1] + [1] * 5),
    "no step": ({"guidance_start": 0.5, "guidance_end": 0.5}, [1] * 5),
    "two passes": ({"hires_scale": 1.5, "hires_strength": 1.0}, [1, 2, 2, 1, 1] * 2),
}


@pytest.mark.parametrize("case", ROWS)
def test_the_samples_of_every_row(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    arguments, samples = ROWS[case]
    assert counted(tiny_pipeline(), monkeypatch, **(INTERVAL | arguments)) == samples


@pytest.mark.parametrize("model", ["sd1", "sdxl"])
def test_the_whole_interval_is_guidance_and_an_empty_one_none(model: str) -> None:
    pipe = Pipeline(getattr(tiny, model)(), torch.device("cpu"), torch.float32)
    same: dict[str, Any] = {"num_inference_steps": 3, "width": 32, "height": 32, "negative_prompt": "fog"}
    guided, plain = latents(pipe, guidance_scale=5.0, **same), latents(pipe, guidance_scale=1.0, **same)
    assert torch.equal(latents(pipe, guidance_scale=5.0, guidance_end=1.0, **same), guided)
    assert torch.equal(latents(pipe, guidance_scale=5.0, guidance_start=0.5, guidance_end=0.5, **same), plain)
    assert not torch.equal(guided, plain)


def test_graphs_for_rows_with_and_without_guidance() -> None:
    """The state moves between two graphs; the scale is read from a buffer in both."""
    pipe, recorder = graphed_pipeline()
    plain = tiny_pipeline()
    changes: list[dict[str, Any]] = [
        {},
        {"guidance_scale": 3.0},
        {"prompt": "a [dog:cat:2]", "negative_prompt": "[fog:rain:1]"},
        {"sampler": "dpm++2m"},
        {"guidance_start": 0.0},
    ]
    for change in changes:
        assert torch.equal(latents(pipe, **(INTERVAL | change)), latents(plain, **(INTERVAL | change))), change
    assert recorder.recorded == 3  # the text, and the step twice


def test_an_inpainting_network_reads_its_image_in_every_row() -> None:
    pipe, recorder = graphed_pipeline(in_channels=9)
    settings = INTERVAL | {"image": PHOTO, "mask_image": MASK, "strength": 1.0}
    assert torch.equal(latents(pipe, **settings), latents(tiny_pipeline(9), **settings))
    assert recorder.recorded == 4  # the text, the image, and the step twice


def test_an_interval_without_effect_is_said() -> None:
    pipe = tiny_pipeline()
    notes = pipe("a cat", seed=1, guidance_scale=1.0, guidance_end=0.5).notes
    assert "guidance_start and guidance_end have no effect: nothing is guided" in notes
    notes = pipe("a cat", seed=1, num_inference_steps=3, guidance_start=0.4, guidance_end=0.6).notes
    assert "guidance acts in no step: none of the 3 lies within 0.4 and 0.6" in notes
    assert not any("guidance" in note for note in pipe("a cat", seed=1, guidance_end=0.7).notes)


def test_an_interval_that_ends_before_it_starts_is_refused() -> None:
    with pytest.raises(FastsdError, match=r"^guidance_start: 0\.6 comes after guidance_end, 0\.4"):
        tiny_pipeline()("a cat", guidance_start=0.6, guidance_end=0.4)
