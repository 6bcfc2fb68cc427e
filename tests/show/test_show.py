"""`fastsd show` from its flags to its files: on the bundled model, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fastsd.image.drawing import DARK, LIGHT
from fastsd.show import KINDS
from fastsd.weights import save_folder
from tests.support.adapter_writers import small_lora
from tests.support.cli import refused
from tests.support.tiny import UNET, sd1

QUICK = ("--settings", "steps=3")


@pytest.mark.heavy
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_draws_the_bundled_model(kind: str, cli: Any) -> None:
    ran = cli("show", kind, *QUICK)
    assert ran.code == 0, ran.err
    with Image.open(f"show-{kind}.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    assert tuple(pixels[0, 0]) == LIGHT.back and (pixels == LIGHT.ink).all(-1).sum() > 100, "a title in ink"
    assert 400 < pixels.shape[1] < 1400
    refused(cli("show", kind, *QUICK), "--out", "--overwrite")


@pytest.mark.heavy
def test_the_animation_has_a_frame_for_each_step(cli: Any) -> None:
    ran = cli("show", "reverse", "--settings", "steps=4", "--theme", "dark", "--out", "new/film.png")
    assert ran.code == 0, ran.err
    assert ran.paths == [Path("new/film.png"), Path("new/film.webp")]
    with Image.open("new/film.webp") as film:
        assert film.n_frames == 4  # type: ignore[attr-defined]
        first, last = np.asarray(film.convert("RGB"), int), None
        film.seek(3)
        last = np.asarray(film.convert("RGB"), int)
    assert np.abs(first - last).mean() > 2
    with Image.open("new/film.png") as image:
        assert image.convert("RGB").getpixel((0, 0)) == DARK.back


@pytest.mark.heavy
def test_an_image_of_ones_own(cli: Any) -> None:
    """Sides that the autoencoder does not take are cut."""
    Image.new("RGB", (77, 70), (200, 200, 200)).save("grey.png")
    assert cli("show", "latents", "--image", "grey.png").code == 0


@pytest.mark.heavy
def test_another_family_of_another_shape(tmp_path: Path, cli: Any) -> None:
    """A tiny SD 1 with an upright image, whose maps are halved to odd sides."""
    save_folder(sd1(), tmp_path / "tiny", torch.float32)
    settings = "steps=2 width=24 height=40"
    ran = cli("show", "attention", "--model", tmp_path / "tiny", "--prompt", "a red cat", "--settings", settings)
    assert ran.code == 0, ran.err


@pytest.mark.heavy
def test_a_lora_is_in_the_image(model: Path, cli: Any) -> None:
    numbers = torch.Generator().manual_seed(0)
    save_file({key: torch.randn(x.shape, generator=numbers) for key, x in small_lora().items()}, "ink.safetensors")
    words = ("show", "reverse", "--model", model, "--prompt", "a cat", "--dtype", "fp32", *QUICK)
    drawn = {}
    for name, lora in (("plain", ()), ("inked", ("--lora", "ink.safetensors:0.8"))):
        ran = cli(*words, *lora, "--out", f"{name}.png")
        assert ran.code == 0, ran.err
        with Image.open(f"{name}.webp") as film:
            film.seek(2)
            drawn[name] = np.asarray(film.convert("RGB"), int)
    assert drawn["plain"].shape == drawn["inked"].shape and np.abs(drawn["plain"] - drawn["inked"]).max() > 8
    refused(cli(*words, "--lora", "no.safetensors", "--out", "none.png"), "--lora", "no.safetensors: no such adapter")


@pytest.mark.heavy
def test_a_model_that_needs_an_image_is_told(tmp_path: Path, cli: Any) -> None:
    save_folder(sd1(replace(UNET, in_channels=9)), tmp_path / "inpainting", torch.float32)
    words = ("show", "reverse", "--model", tmp_path / "inpainting", "--prompt", "x")
    refused(cli(*words), "--model", "generates from an image")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["revers"], "did you mean reverse"),
        (["forward", "--pixel", "1,2"], "--pixel"),
        (["reverse", "--image", "x.png"], "--image"),
        (["forward", "--image", "none.png"], "--image none.png"),
        (["forward", "--out", "x.jpg"], ".png"),
        (["forward", "--settings", "stepps=3"], "did you mean steps"),
        (["attention", "--pixel", "1"], "X,Y"),
        (["attention", "--pixel", "64,0"], "outside"),
        (["attention", "--prompt", " "], "no words"),
        (["forward", "--seed", "-1"], "--seed"),
        (["forward", "--model", "none"], "none"),
        (["forward", "--model", "none"], "--prompt"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_is_said(words: list[str], said: str, cli: Any) -> None:
    if said == "none":
        words = [*words, "--prompt", "x"]
    refused(cli("show", *words), said)
    assert not list(Path().glob("*.png"))
