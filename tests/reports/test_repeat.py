"""Reports of images that do not come again: in batches, at odd step counts, and from other programs' settings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fastsd.cli.models import differences
from fastsd.config import SchedulerConfig
from fastsd.errors import FastsdError
from fastsd.generate.like import LIKE
from fastsd.generate.noise import SOURCES
from fastsd.generate.tables import make_table
from fastsd.image.infotext import is_another, read_hashes
from fastsd.parameters import check_call
from fastsd.sampling.samplers import SAMPLERS
from tests.support.cli import pixels, settings, write_image
from tests.support.pipelines import tiny_pipeline

VARIED = {"seed": 5, "subseed": 3, "subseed_strength": 0.4, "num_inference_steps": 1, "num_images_per_prompt": 3}


@pytest.mark.parametrize("noise", SOURCES)
def test_a_variation_in_a_batch_comes_again_by_its_own_settings(noise: str) -> None:
    """Image k of a call is image 0 of a call with the settings that are stored for it, at any batch size.

    One generator draws for a whole batch, so there its second noise has one seed too (as the first has).
    """
    pipe = tiny_pipeline()
    varied = VARIED | {"noise": noise, "width": 16, "height": 16}
    together = pipe("a cat", batch_size=3, **varied)
    assert len({image.tobytes() for image in together.images}) == 3
    for image, one_by_one, own in zip(
        together.images, pipe("a cat", batch_size=1, **varied).images, together.own, strict=True
    ):
        again = pipe("a cat", **varied | own | {"num_images_per_prompt": 1}).images[0]
        np.testing.assert_array_equal(image, again)
        np.testing.assert_array_equal(image, one_by_one)


@pytest.mark.heavy
@pytest.mark.parametrize("like", LIKE)
def test_a_variation_of_the_command_line_comes_again(like: str, cli: Callable, model: Path) -> None:
    flags = ("--seed", 5, "--subseed", 3, "--subseed-strength", 0.4, "--like", like, "-W", 16, "-H", 16)
    for batch in (1, 2, 3):
        ran = cli("-p", "a cat", "-m", model, *flags, "--count", 3, "-b", batch, "-o", f"{batch}.png")
        for path in ran.paths:
            again = cli("--from-image", path, "-m", model, "-o", f"again-{path.name}")
            np.testing.assert_array_equal(pixels(path), pixels(again.paths[0]))
            np.testing.assert_array_equal(pixels(path), pixels(path.with_name(path.name.replace(f"{batch}-", "1-", 1))))


@pytest.mark.parametrize("like", LIKE)
def test_few_steps_make_calls_or_are_refused(like: str) -> None:
    """A1111's DDIM makes N - 1 calls, so 1 step would decode noise (its modules/sd_samplers_timesteps_impl.py)."""
    refused = set()
    for sampler in SAMPLERS:
        for steps in (1, 2, 3):
            settings = check_call({}).replace(like=like, sampler=sampler, schedule="default", spacing=None, eta=0.0)
            try:
                assert len(make_table(settings, SchedulerConfig(), steps, steps)) > 0
            except FastsdError as error:
                assert error.argument == "num_inference_steps"
                refused.add((sampler, steps))
    assert refused == ({("ddim", 1)} if like == "a1111" else set())


LINE = "Steps: 1, Sampler: Euler, CFG scale: 2, Seed: 8, Size: 16x16"


@pytest.mark.heavy
def test_an_embedding_of_an_a1111_image_that_is_missing_is_said(cli: Callable, model: Path) -> None:
    """Else "EasyNegative" would be read as a word, without a sign. A1111 writes each file's SHA-256, 12 digits."""
    Path("ti").mkdir()
    save_file({"emb_params": torch.ones(2, 32)}, "ti/EasyNegative.safetensors")
    text = f'cat\nNegative prompt: (easynegative:1.2)\n{LINE}, TI hashes: "EasyNegative: %s"'
    theirs = write_image(Path("theirs.png"), parameters=text % "c74b4e810b03")
    missing = cli("--from-image", theirs, "-m", model)
    assert "not repeated: the embedding 'EasyNegative'; give it with --embedding or --embedding-dir" in missing.err
    other = cli("--from-image", theirs, "-m", model, "--embedding-dir", "ti")
    assert "the embedding 'EasyNegative' is another file than that image's, c74b4e810b03" in other.err
    digest = settings(other.paths[0])["embeddings"][0]["sha256"]
    theirs = write_image(Path("theirs.png"), parameters=text % digest[:12])
    same = cli("--from-image", theirs, "-m", model, "--embedding-dir", "ti")
    assert "EasyNegative" not in same.err and (pixels(same.paths[0]) == pixels(other.paths[0])).all()


@pytest.mark.heavy
def test_a_lora_of_an_a1111_image_that_is_another_file_is_said(cli: Callable, model: Path) -> None:
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_v"
    sizes = {"down": (4, 32), "up": (32, 4)}
    Path("loras").mkdir()
    save_file({f"{layer}.lora_{k}.weight": torch.ones(size) for k, size in sizes.items()}, "loras/ink.safetensors")
    text = f'cat <lora:ink:0.8>\n{LINE}, Lora hashes: "ink: %s"'
    for digest, said in (("abcdef012345", True), ("7460a6fa", False)):
        theirs = write_image(Path("theirs.png"), parameters=text % digest)
        ran = cli("--from-image", theirs, "-m", model, "--lora-dir", "loras")
        assert ("the LoRA 'ink.safetensors' is another file than that image's, abcdef012345" in ran.err) == said
    own = settings(ran.paths[0])["loras"][0]["hash"]
    ran = cli(
        "--from-image", write_image(Path("theirs.png"), parameters=text % own), "-m", model, "--lora-dir", "loras"
    )
    assert ran.code == 0 and "another file" not in ran.err


def test_a1111s_lists_of_hashes() -> None:
    assert read_hashes("a: 1ab2, b c: 33, , d:, :4, e") == {"a": "1ab2", "b c": "33"}
    assert not is_another("aaaabbbbcc", "aaaabbbbccdd") and is_another("aaaabbbbcc", "aaaabbbbdd")
    assert not is_another("7460a6fa", "aaaabbbbccdd")


def test_a_variation_of_noise_of_one_row_is_finite() -> None:
    """A column of one number has no angle to another: A1111's rule divides by the sine of 0 there."""
    arguments = VARIED | {"height": 8, "width": 64, "output_type": "latent"}
    assert torch.isfinite(tiny_pipeline()("a cat", **arguments).images).all()


def test_an_empty_prompt_generates_from_the_command_line(cli: Callable, tmp_path: Path) -> None:
    """A1111 and diffusers take an empty prompt; without the flag there is none."""
    assert cli("-p", "", "--steps", "1", "-o", "empty.png").code == 0
    assert cli("--steps", "1").code == 2


def test_another_model_than_an_a1111_images_is_noted() -> None:
    """By A1111's short hash, where `fastsd inspect` or the hub made that of the model known; else that it is not."""
    image = {"model_hash": "31e35c80fc", "model": "sd_xl_base_1.0"}
    assert "is another file than that image's, '31e35c80fc'" in differences(image, {"model_hash": "aaaabbbbcc"})[0]
    assert differences(image, {"model_hash": "31e35c80fc"}) == []
    assert "fastsd inspect" in differences(image, {})[0]
    assert differences({"model": "sd_xl_base_1.0"}, {}) == []
