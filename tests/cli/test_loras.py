"""LoRAs from the command line and from the prompt, and in an image's metadata."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.support.cli import refused

pytestmark = pytest.mark.heavy


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """A strong change of one layer of the tiny model, as kohya's trainer writes it."""
    generator = torch.Generator().manual_seed(0)
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_v"
    file = tmp_path / "loras" / "ink.safetensors"
    file.parent.mkdir()
    save_file(
        {
            f"{layer}.lora_down.weight": torch.randn(4, 32, generator=generator),
            f"{layer}.lora_up.weight": torch.randn(32, 4, generator=generator),
            f"{layer}.alpha": torch.tensor(4.0),
        },
        file,
    )
    return file


def pixels(path: Path) -> bytes:
    return Image.open(path).tobytes()


def test_loras(cli: Callable, model: Path, lora: Path) -> None:
    base = ("-m", model, "--seed", "1")
    plain = cli("-p", "a cat", *base)
    given = cli("-p", "a cat", *base, "--lora", f"{lora}:0.5")
    assert pixels(given.paths[0]) != pixels(plain.paths[0])
    for words in (
        ("-p", "a cat<lora:ink:0.5>", "--lora-dir", lora.parent),
        ("-p", "a cat<lora:ink:0.9:0.5>", "--lora-dir", lora.parent),  # the file changes the UNet alone
    ):
        assert pixels(cli(*words, *base).paths[0]) == pixels(given.paths[0]), words
    assert pixels(cli("-p", "a cat", *base, "--lora", f"{lora}:0").paths[0]) == pixels(plain.paths[0])
    assert pixels(cli("-p", "a cat", *base, "--lora", lora).paths[0]) != pixels(given.paths[0])


def test_a_lora_given_twice_counts_twice(cli: Callable, model: Path, lora: Path) -> None:
    """0.25 and 0.25 add up to 0.5, but round twice: the weights differ by up to 2^-24 (3 |W| + 1.25 |D|), D the change.

    D is ten times W here, so that is some 6 * 2^-24 of a change by 0.25 D, which moves no pixel by more than 255
    levels. Were the model a hundred times as sensitive to the roundings, they would still move a pixel by under 0.01
    levels: it crosses to the next level where it lies that near to it, in one pixel of a hundred.
    """
    half, twice = ("--lora", f"{lora}:0.25"), ("--lora", f"{lora}:0.25", "--lora", f"{lora}:0.25")
    images = [
        np.asarray(Image.open(cli("-p", "a cat", "-m", model, "--seed", "1", *words).paths[0])).astype(int)
        for words in (("--lora", f"{lora}:0.5"), twice, half)
    ]
    distance, far = (abs(image - images[0]) for image in images[1:])
    assert distance.max() <= 1 and (distance > 0).mean() < 0.01
    assert far.max() > 1 and (far > 0).mean() > 0.01  # one of the two alone


def test_an_image_remembers_its_loras(cli: Callable, model: Path, lora: Path) -> None:
    given = cli("-p", "a cat", "-m", model, "--seed", "1", "--lora", f"{lora}:0.5").paths[0]
    stored = json.loads(Image.open(given).text["fastsd"])["loras"]
    assert [(one["name"], one["strength"]) for one in stored] == [("ink.safetensors", 0.5)]
    refused(cli("--from-image", given), "it was generated with --lora 'ink.safetensors'", "give that file again")
    for words in (("--lora", f"{lora}:0.5"), ("--lora-dir", lora.parent)):
        again = cli("--from-image", given, *words).paths[0]
        assert pixels(again) == pixels(given)
        assert json.loads(Image.open(again).text["fastsd"])["loras"] == stored


def test_a_lora_of_the_same_name_is_not_taken_for_an_images(cli: Callable, model: Path, lora: Path) -> None:
    given = cli("-p", "a cat", "-m", model, "--seed", "1", "--lora", f"{lora}:0.5").paths[0]
    (lora.parent / "old").mkdir()
    lora.rename(lora.parent / "old" / lora.name)  # which a file of another style takes the place of
    save_file({"lora_unet_conv_in.alpha": torch.tensor(1.0)}, lora)
    assert pixels(cli("--from-image", given, "--lora-dir", lora.parent).paths[0]) == pixels(given)
    (lora.parent / "old" / lora.name).unlink()
    refused(cli("--from-image", given, "--lora-dir", lora.parent), "--lora-dir does not hold it, give that file again")


def test_loras_that_cannot_be(cli: Callable, model: Path, lora: Path) -> None:
    base = ("-p", "a cat", "-m", model)
    refused(cli(*base, "--lora", "nowhere.safetensors"), "--lora nowhere.safetensors: no such adapter")
    refused(cli(*base, "--lora", f"{lora}:much"), "'much' should be a strength, a number from -100 to 100")
    refused(cli("-p", "a <lora:ink>", "-m", model), "--prompt: <lora:ink> needs --lora-dir")
    refused(cli("-p", "a <lora:inc>", "-m", model, "--lora-dir", lora.parent), "did you mean ink?")
    refused(cli("-p", "a <lora:ink>", "-m", model, "--lora-dir", "nowhere"), "--lora-dir nowhere: no such folder")
    refused(cli(*base, "--lora-dir", "nowhere"), "--lora-dir nowhere: no such folder")
    stranger = {f"lora_unet_elsewhere.lora_{part}.weight": torch.ones(2, 2) for part in ("up", "down")}
    save_file(stranger, lora.parent / "other.safetensors")
    refused(cli(*base, "--lora", lora.parent / "other.safetensors"), "not in this model: lora_unet_elsewhere")
    partial = cli(*base, "--lora", lora.parent / "other.safetensors", "--allow-partial")
    assert "not in this model" in partial.err and len(partial.paths) == 1
