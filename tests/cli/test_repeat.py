"""--from-image: what is asked for where an image leaves it open, and how a wrong setting of an image is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.cli import refused, settings, write_image

GRAPH = {
    "3": {
        "class_type": "KSampler",
        "inputs": {
            "seed": ["20", 0],
            "steps": ["20", 1],
            "cfg": 2,
            "sampler_name": "euler",
            "scheduler": ["20", 2],
            "denoise": 1,
            "positive": ["6", 0],
            "negative": ["6", 0],
            "latent_image": ["5", 0],
        },
    },
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": ["99", 0], "height": 64, "batch_size": 1}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat"}},
    "20": {"class_type": "Settings", "inputs": {"row": 3, "file": "runs.csv"}},
}


@pytest.mark.heavy
def test_settings_that_a_graph_leaves_open_are_asked_for(cli: Callable, model: Path, tmp_path: Path) -> None:
    words = ["--from-image", write_image(tmp_path / "x.png", prompt=json.dumps(GRAPH)), "-m", model]
    refused(cli(*words), "x.png: its 'seed' comes from node 20, Settings; give --seed")
    refused(cli(*words, "--seed", 4), "its 'steps' comes from node 20, Settings; give --steps")
    refused(cli(*words, "--seed", 4, "--steps", 2), "its 'scheduler' comes from node 20, Settings; give --schedule")
    words += ["--seed", 4, "--steps", 2, "--sampler", "heun"]  # with another sampler goes that one's schedule
    refused(cli(*words), "its 'width' comes from node 99, which is missing; give --width")
    found = settings(cli(*words, "--width", 72).paths[0])
    assert [found[name] for name in ("seed", "num_inference_steps", "sampler", "width")] == [4, 2, "heun", 72]


A1111 = "a cat\nSteps: 2, Sampler: Euler, CFG scale: 2, Seed: 1, {}"


@pytest.mark.parametrize("upscaler", ["Latent (area)", "Latent (bislerp)"])
def test_an_upscaler_that_fastsd_lacks_is_refused_with_the_nearest(
    cli: Callable, tmp_path: Path, upscaler: str
) -> None:
    pairs = f"Size: 64x64, Denoising strength: 0.5, Hires upscale: 2, Hires upscaler: {upscaler}"
    image = write_image(tmp_path / "x.png", parameters=A1111.format(pairs))
    refused(
        cli("--from-image", image),
        f"it was generated with the hires upscaler '{upscaler}', which fastsd lacks; the nearest is latent: "
        "give --hires-upscaler",
    )


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("pairs", "said"),
    [("Size: 65x64", "its width is 65; it should be"), ("Size: 64x64, Clip skip: 9", "its clip_skip is 9; it should")],
)
def test_a_wrong_setting_of_an_image_is_named_with_the_image(
    cli: Callable, model: Path, tmp_path: Path, pairs: str, said: str
) -> None:
    image = write_image(tmp_path / "x.png", parameters=A1111.format(pairs))
    refused(cli("--from-image", image, "-m", model), f"--from-image {image}: {said}")
    refused(cli("--from-image", image, "-m", model, "-W", 63, "--clip-skip", 1), "error: --width is 63; it should be")
