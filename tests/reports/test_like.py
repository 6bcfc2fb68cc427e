"""What people reported of images that other programs made, and of repeating them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from fastsd.image.metadata import read_texts
from fastsd.pipeline import Pipeline
from tests.support import tiny
from tests.support.cli import pixels, refused, settings, write_image

pytestmark = pytest.mark.heavy

BASE = "Steps: 3, Sampler: Euler a, Schedule type: Karras, CFG scale: 3, Seed: 8, Size: 64x64, Model: tiny"


def repeat(cli: Callable, model: Path, text: str, *words: object) -> object:
    return cli("--from-image", write_image(Path("theirs.png"), parameters=text), "-m", model, *words)


def test_an_image_of_a1111_repeats_by_a1111s_rules(cli: Callable, model: Path) -> None:
    """Each setting of the text acts: as the call with the same settings does."""
    more = "Variation seed: 5, Variation seed strength: 0.25, ENSD: 31337, Emphasis: No norm, Seed resize from: 48x80"
    ran = repeat(cli, model, f"a (red:1.3) cat\nNegative prompt: fog\n{BASE}, {more}, Version: v1.10.1")
    assert ran.code == 0 and ran.err.count("\n") == 1 and "repeated by the rules of A1111" in ran.err
    expected = Pipeline.from_pretrained(model)(
        "a (red:1.3) cat",
        negative_prompt="fog",
        like="a1111",
        noise="gpu",
        subseed=5,
        subseed_strength=0.25,
        ensd=31337,
        emphasis="no_norm",
        seed_resize_from="48x80",
        num_inference_steps=3,
        sampler="euler_a",
        schedule="karras",
        guidance_scale=3,
        seed=8,
        width=64,
        height=64,
    )
    np.testing.assert_array_equal(pixels(ran.paths[0]), np.asarray(expected.images[0]))
    again = cli("--from-image", ran.paths[0])
    assert again.err == ""
    np.testing.assert_array_equal(pixels(again.paths[0]), pixels(ran.paths[0]))
    text = Image.open(ran.paths[0]).text["parameters"]
    assert "Emphasis: No norm" in text and "RNG: NV" in text and "ENSD: 31337" in text


def test_the_cpus_noise_of_a1111_is_another(cli: Callable, model: Path) -> None:
    """A1111's "RNG: CPU" is a CPU generator of the same seed; without the key it is the GPU's."""
    gpu, cpu = (repeat(cli, model, f"a cat\n{BASE}{rng}, Version: v1.9.4") for rng in ("", ", RNG: CPU"))
    assert settings(gpu.paths[0])["noise"] == "gpu" and settings(cpu.paths[0])["noise"] == "cpu"
    assert (pixels(gpu.paths[0]) != pixels(cpu.paths[0])).any()


def test_images_of_one_call_repeat_alone_with_a_batchs_noise(cli: Callable, model: Path) -> None:
    whole = cli("-p", "a cat", "-m", model, "--like", "comfy", "--sampler", "euler_a", "--count", 3, "-b", 2, "-s", 4)
    assert whole.code == 0 and [settings(path)["noise_index"] for path in whole.paths] == [0, 1, 2]
    for path in whole.paths:
        again = cli("--from-image", path)
        assert again.code == 0
        np.testing.assert_array_equal(pixels(again.paths[0]), pixels(path))


def test_an_image_of_comfyui_repeats_by_its_graph(cli: Callable, model: Path, tmp_path: Path) -> None:
    """ComfyUI stores its graph in the PNG text `prompt`."""
    graph = {
        "1": {
            "class_type": "KSampler",
            "inputs": {
                "seed": 5,
                "steps": 3,
                "cfg": 4.0,
                "sampler_name": "euler_ancestral",
                "scheduler": "karras",
                "denoise": 1.0,
                "model": ["2", 0],
                "positive": ["3", 0],
                "negative": ["4", 0],
                "latent_image": ["5", 0],
            },
        },
        "2": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "dreams.safetensors"}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"text": "a (red:1.3) cat", "clip": ["2", 1]}},
        "4": {"class_type": "CLIPTextEncode", "inputs": {"text": "fog", "clip": ["2", 1]}},
        "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 72, "batch_size": 1}},
    }
    path = write_image(tmp_path / "comfy.png", prompt=json.dumps(graph), workflow="{}")
    refused(cli("--from-image", path), "the model 'dreams'", "--model")
    ran = cli("--from-image", path, "-m", model)
    assert ran.code == 0 and "repeated by the rules of ComfyUI" in ran.err
    expected = Pipeline.from_pretrained(model)(
        "a (red:1.3) cat",
        negative_prompt="fog",
        like="comfy",
        num_inference_steps=3,
        guidance_scale=4,
        sampler="euler_a",
        schedule="karras",
        seed=5,
        width=64,
        height=72,
    )
    np.testing.assert_array_equal(pixels(ran.paths[0]), np.asarray(expected.images[0]))


@pytest.mark.parametrize("comment", [b"ASCII\0\0\0Screenshot", b"UNICODE\0" + "Screenshot".encode("utf-16-be")])
def test_a_screenshot_is_no_prompt(cli: Callable, model: Path, tmp_path: Path, comment: bytes) -> None:
    """Phones write "Screenshot" where A1111 has its settings, EXIF's UserComment."""
    exif = Image.Exif()
    exif[ExifTags.IFD.Exif] = {ExifTags.Base.UserComment: comment}
    path = tmp_path / "phone.jpg"
    Image.new("RGB", (8, 8)).save(path, exif=exif.tobytes())
    refused(cli("--from-image", path, "-m", model), "no settings are stored in this image")


def test_an_image_with_an_empty_prompt_repeats(cli: Callable, model: Path) -> None:
    ran = repeat(cli, model, BASE)
    assert ran.code == 0
    again = cli("--from-image", ran.paths[0])
    np.testing.assert_array_equal(pixels(again.paths[0]), pixels(ran.paths[0]))


@pytest.mark.parametrize(
    ("what", "name", "offered"),
    [("Sampler", "DPM++ 9M SDE", "dpm++"), ("Schedule type", "Karras Exponential", "exponential")],
)
def test_a_sampler_that_is_missing_is_the_images(
    cli: Callable, model: Path, what: str, name: str, offered: str
) -> None:
    values = {"Sampler": "Euler", "Schedule type": "Karras"} | {what: name}
    line = ", ".join(f"{key}: {value}" for key, value in values.items())
    ran = repeat(cli, model, f"a cat\nSteps: 2, {line}, Seed: 1, Size: 64x64, Version: v1.10.1")
    flag = "--sampler" if what == "Sampler" else "--schedule"
    refused(ran, "theirs.png", repr(name), "which fastsd lacks; the nearest is " + offered, flag)
    ran = repeat(cli, model, f"a cat\nSteps: 2, {line}, Seed: 1, Size: 64x64", "--sampler", "ddim")
    assert ran.code == 0
    if what == "Sampler":
        assert repeat(cli, model, f"a cat\nSteps: 2, {line}, Seed: 1, Size: 64x64", flag, "euler").code == 0


def test_what_has_no_effect_in_a_repeated_image_is_said(cli: Callable, model: Path) -> None:
    text = f"a cat\n{BASE}, Variation seed: 3, Tiling: True, Version: v1.10.1"
    ran = repeat(cli, model, text)
    assert ran.code == 0 and "not repeated: Tiling" in ran.err
    assert "not repeated: --subseed, as there is no --subseed-strength" in ran.err


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_clip_skip_2_of_an_sdxl_image_of_a1111_is_the_layer_that_sdxl_reads(family: str) -> None:
    """A1111 reads SDXL's last layer but one whatever "Clip skip" says (modules/sd_hijack_clip.py,
    `FrozenCLIPEmbedderForSDXLWithCustomWords`; sd_hijack_open_clip.py); in SD 1 the setting counts."""
    components = getattr(tiny, family)()
    components.defaults = {"num_inference_steps": 2}
    pipe = Pipeline(components, torch.device("cpu"), torch.float32)
    side = components.sample_size * components.vae.config.downscale
    arguments = {"seed": 1, "like": "a1111", "width": side, "height": side, "output_type": "latent"}
    one, two = (pipe("a cat", clip_skip=skip, **arguments).images for skip in (1, 2))
    assert torch.equal(one, two) == (family == "sdxl")
    text = f"a cat\nSteps: 2, Sampler: Euler, Seed: 1, Size: {side}x{side}, Clip skip: 2, Version: v1.10.1"
    assert read_texts({"parameters": text})[0]["clip_skip"] == 2
