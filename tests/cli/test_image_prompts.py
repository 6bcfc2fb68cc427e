"""--ip-adapter and what belongs to it: order, files, what the image stores, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fastsd import ImagePrompt, Pipeline
from tests.support.cli import pixels, refused, settings
from tests.support.ip_adapters import write_adapter
from tests.support.pipelines import MASK, PHOTO, tiny_components

pytestmark = pytest.mark.heavy


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    PHOTO.save(tmp_path / "photo.png")
    MASK.save(tmp_path / "mask.png")
    return write_adapter(tmp_path, tiny_components().unet)


def test_flags_are_the_calls_arguments_and_repeat(cli: Callable, model: Path, adapter: Path) -> None:
    photo, mask = adapter.with_name("photo.png"), adapter.with_name("mask.png")
    base = ("-p", "x", "-m", model, "-s", 3, "--dtype", "fp32")
    words = ("--ip-adapter", f"{adapter}:0.6", "--ip-image", photo, "--ip-image", mask, "--ip-mask", mask)
    ran = cli(*base, *words)
    assert (ran.code, ran.err) == (0, "")
    pipe = Pipeline.from_pretrained(model, dtype="fp32")
    prompt = ImagePrompt(pipe.load_ip_adapter(adapter), [PHOTO, MASK], 0.6, MASK)
    np.testing.assert_array_equal(pixels(ran.paths[0]), np.asarray(pipe("x", seed=3, image_prompts=[prompt]).images[0]))
    stored = settings(ran.paths[0])["image_prompts"]
    assert [one["name"] for one in stored[0]["images"]] == ["photo.png", "mask.png"] and stored[0]["scale"] == 0.6
    refused(cli("--from-image", ran.paths[0]), "it was generated with --ip-adapter 'embedding-0.safetensors'")
    again = cli("--from-image", ran.paths[0], *words)
    assert (again.code, again.err) == (0, "")
    np.testing.assert_array_equal(pixels(again.paths[0]), pixels(ran.paths[0]))
    other = cli("--from-image", ran.paths[0], *words[:3], photo)
    assert "--ip-image or --ip-mask is another image than the first time" in other.err


def test_what_is_wrong_is_named(cli: Callable, model: Path, adapter: Path) -> None:
    base, photo = ("-p", "x", "-m", model), adapter.with_name("photo.png")
    refused(cli(*base, "--ip-image", photo), "--ip-image is", "given before --ip-adapter")
    refused(cli(*base, "--ip-adapter", adapter), "given without --ip-image")
    refused(cli(*base, "--ip-adapter", f"{adapter}:x", "--ip-image", photo), "'x' should be a scale")
    refused(cli(*base, "--ip-adapter", adapter, "--ip-image", "no.png"), "--ip-image no.png: no such file")
    refused(cli(*base, "--ip-adapter", "no.safetensors", "--ip-image", photo), "--ip-adapter no.safetensors")
