"""Drawing from the command line: what is written, what is refused, what survives an interruption."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastsd.image import files as images
from fastsd.pipeline import Pipeline
from tests.support.cli import pixels, refused, settings, write_image

pytestmark = pytest.mark.heavy

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    y, x = np.mgrid[0:64, 0:64]
    path = tmp_path / "photo.png"
    Image.fromarray(np.stack([4 * x, 4 * y, 2 * (x + y)], axis=-1).astype(np.uint8)).save(path)
    return path


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    path, area = tmp_path / "mask.png", np.zeros((64, 64), dtype=np.uint8)
    area[16:48, 8:40] = 255
    Image.fromarray(area).save(path)
    return path


# What is written


def test_an_image_with_its_settings(cli: Callable, model: Path) -> None:
    ran = cli("-p", "a cat, sitting", "-n", "a dog", "-m", model, "--seed", 7, "--guidance", 3)
    assert (ran.code, ran.err) == (0, "")
    assert ran.paths == [Path("outputs/00000-7-a-cat-sitting.png")]
    assert pixels(ran.paths[0]).shape == (64, 64, 3)
    text = images.read_text(ran.paths[0])["parameters"]
    assert text.startswith(
        "a cat, sitting\nNegative prompt: a dog\n"
        "Steps: 2, Sampler: DDIM, Timestep spacing: leading, CFG scale: 3, Seed: 7, Size: 64x64, Model: tiny, Device: "
    )
    assert cli("-p", "a cat, sitting", "-m", model, "--seed", 7).paths == [Path("outputs/00001-7-a-cat-sitting.png")]


def test_the_command_line_generates_what_the_pipeline_generates(cli: Callable, model: Path) -> None:
    ran = cli("-p", "x", "-m", model, "-s", 3, "--sampler", "Euler a", "--count", 3, "-b", 2, "--dtype", "fp32")
    expected = Pipeline.from_pretrained(model, dtype="fp32")("x", seed=3, sampler="euler_a", num_images_per_prompt=3)
    assert [settings(path)["seed"] for path in ran.paths] == [3, 4, 5]
    for path, image in zip(ran.paths, expected.images, strict=True):
        np.testing.assert_array_equal(pixels(path), np.asarray(image))


def test_a_random_seed_is_a_new_one_and_is_written_down(cli: Callable, model: Path) -> None:
    seeds = [settings(cli("-p", "x", "-m", model, *words).paths[0])["seed"] for words in ([], ["--seed", "-1"])]
    assert len(set(seeds)) == 2 and all(0 <= seed < 2**32 for seed in seeds)


@pytest.mark.parametrize("left", [(), ("--subseed", -1)])
def test_a_random_second_seed_is_written_down(cli: Callable, model: Path, left: tuple[str, int]) -> None:
    varied = ("-p", "x", "-m", model, "--seed", 1, "--subseed-strength", 0.5)
    assert cli(*varied, *left, "-o", "a.png", "-b", 1, "--count", 2).code == 0
    first, second = (settings(f"a-{k}.png")["subseed"] for k in (0, 1))
    assert second == first + 1
    assert cli(*varied, "--subseed", first, "-o", "b.png").code == 0
    np.testing.assert_array_equal(pixels("a-0.png"), pixels("b.png"))


def test_output_is_a_file_a_folder_or_several_files(cli: Callable, model: Path) -> None:
    base = ("-p", "x", "-m", model, "-s", 1)
    assert cli(*base, "-o", "new/a.png").paths == [Path("new/a.png")]
    assert cli(*base, "-o", "b", "--count", 2).paths == [Path("b/00000-1-x.png"), Path("b/00001-2-x.png")]
    assert cli(*base, "-o", "a.png", "--count", 2).paths == [Path("a-0.png"), Path("a-1.png")]
    assert cli(*base, "-o", "a.webp").paths == [Path("a.webp")]
    np.testing.assert_array_equal(pixels(Path("a.webp")), pixels(Path("new/a.png")))
    before = Path("a-1.png").read_bytes()
    refused(cli(*base, "-o", "a.png", "--count", 3), "a-0.png", "--overwrite")
    assert Path("a-1.png").read_bytes() == before and not Path("a-2.png").exists()
    assert cli("-p", "y", "-m", model, "-o", "a-1.png", "--overwrite").code == 0
    assert Path("a-1.png").read_bytes() != before


def test_notes_are_a_line_each_on_stderr(cli: Callable, model: Path, tmp_path: Path) -> None:
    Image.new("RGB", (61, 75), "red").save(tmp_path / "odd.png")
    Image.new("L", (10, 10)).save(tmp_path / "black.png")
    photos = ("--image", tmp_path / "odd.png", "--mask", tmp_path / "black.png")
    ran = cli("-p", "x " * 100, "-m", model, *photos, "--plain-prompt")
    lines = ran.err.splitlines()
    assert ran.code == 0 and all(line.startswith("note: ") for line in lines)
    for said in ("61x75 to 56x72", "mask was resized", "mask is black all over", "too long"):
        assert sum(said in line for line in lines) == 1, said


def test_the_progress_bar_shows_on_terminals_or_when_asked(cli: Callable, model: Path) -> None:
    base = ("-p", "x", "-m", model, "--count", 2, "-b", 1)
    assert cli(*base, "--no-progress").err == ""
    shown = cli(*base, "--progress")
    assert re.search(r"4/4 .*(it/s|s/it)", shown.err) and len(shown.paths) == 2


def test_inpainting_keeps_what_the_mask_keeps(cli: Callable, model: Path, photo: Path, mask: Path) -> None:
    ran = cli("-p", "x", "-m", model, "--image", photo, "--mask", mask, "--strength", 1, "-o", "a.png")
    outside = pixels(mask) == 0
    np.testing.assert_array_equal(pixels(ran.paths[0])[outside], pixels(photo)[outside])
    assert (pixels(ran.paths[0]) != pixels(photo)).any()


# Repeating


@pytest.mark.parametrize(
    "words",
    [
        ["--seed", "5", "--guidance", "3.3", "-n", "a, b: c"],
        ["--sampler", "euler_a", "--schedule", "karras", "--steps", "3", "-W", "72", "-H", "48"],
        ["--sampler", "ddim", "--eta", "0.5", "--guidance-rescale", "0.7", "--clip-skip", "2"],
        ["--sampler", "dpm++2m_sde", "--vae-tiling", "--dtype", "bf16"],
    ],
)
def test_from_image_repeats_to_the_pixel(cli: Callable, model: Path, words: list[str]) -> None:
    prompt = "a cat\nNegative prompt: no\nSteps: 9, Sampler: Heun, CFG scale: 1, Seed: 1"
    first = cli("-p", prompt, "-m", model, *words, "--count", 2)
    again = cli("--from-image", first.paths[1])
    assert (again.code, again.err) == (0, "") and len(again.paths) == 1
    np.testing.assert_array_equal(pixels(again.paths[0]), pixels(first.paths[1]))
    assert settings(again.paths[0]) | {"batch_size": 2} == settings(first.paths[1])
    other = cli("--from-image", first.paths[1], "--guidance", 9.5)
    assert settings(other.paths[0])["guidance_scale"] == 9.5
    assert (pixels(other.paths[0]) != pixels(first.paths[1])).any()


@pytest.mark.parametrize("masked", [False, True])
def test_an_image_from_an_image_asks_for_it_again(
    cli: Callable, model: Path, photo: Path, mask: Path, masked: bool
) -> None:
    files = ["--image", photo, *(["--mask", mask] if masked else [])]
    first = cli("-p", "x", "-m", model, *files, "--strength", 0.6, "-s", 1, "-o", "a.png")
    refused(cli("--from-image", "a.png", "-o", "b.png"), "--from-image a.png", "--image 'photo.png' (sha256 ")
    assert not Path("b.png").exists()
    again = cli("--from-image", "a.png", *files, "-o", "b.png")
    assert (again.code, again.err) == (0, "")
    np.testing.assert_array_equal(pixels(again.paths[0]), pixels(first.paths[0]))
    other = cli("--from-image", "a.png", "--image", mask, *files[2:], "-o", "c.png")
    assert other.code == 0 and "--image is another file than 'photo.png'" in other.err


def test_from_image_with_a_model_that_moved_or_changed(cli: Callable, model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "copy")
    cli("-p", "x", "-m", tmp_path / "copy", "-s", 1, "-o", "a.png")
    config = tmp_path / "copy" / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"beta_end": 0.012', '"beta_end": 0.013'))
    assert "not the one that generated the image" in cli("--from-image", "a.png", "-o", "b.png").err
    shutil.rmtree(tmp_path / "copy")
    refused(cli("--from-image", "a.png", "-o", "c.png"), "the model 'copy'", "--model")
    assert cli("--from-image", "a.png", "-m", model, "-o", "c.png").err == ""
    np.testing.assert_array_equal(pixels(Path("a.png")), pixels(Path("c.png")))


def test_from_image_of_another_program(cli: Callable, model: Path, tmp_path: Path) -> None:
    text = (
        "a cat\nSteps: 3, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 2, Seed: 8, Size: 72x64, "
        "Model: dreams, Tiling: True, Version: v1.9.4"
    )
    foreign = write_image(tmp_path / "foreign.png", parameters=text)
    refused(cli("--from-image", foreign), "the model 'dreams'", "--model")
    ran = cli("--from-image", foreign, "-m", model)
    assert ran.code == 0 and ran.err.count("\n") == 1 and "not repeated: Tiling" in ran.err
    found = settings(ran.paths[0])
    assert (found["sampler"], found["schedule"], found["seed"], found["width"]) == ("dpm++2m", "karras", 8, 72)
    text = "a cat\nSteps: 3, Sampler: Euler, Seed: 8, Size: 64x64, Refiner: dreams, Refiner switch at: 0.8"
    ran = cli("--from-image", write_image(tmp_path / "refined.png", parameters=text), "-m", model)
    assert ran.code == 0 and "not repeated: Refiner\n" in ran.err
    assert "not repeated: --refiner-switch, as there is no --refiner" in ran.err


def test_from_image_of_what_cannot_be_repeated(cli: Callable, model: Path, tmp_path: Path) -> None:
    lacks = "the sampler 'DPM adaptive', which fastsd lacks; the nearest is"
    cases = {
        "plain": ({}, "no settings"),
        "size": ({"parameters": "x\nSteps: 2, Sampler: Euler, Seed: 1, Size: 64x99999"}, "height is '99999'"),
        "steps": ({"fastsd": '{"prompt": "x", "num_inference_steps": 0, "model_path": "digits"}'}, "steps is '0'"),
        "sampler": ({"parameters": "x\nSteps: 2, Sampler: DPM adaptive, Seed: 1"}, lacks),
        "upscaled": ({"parameters": "x\nSteps: 2, Sampler: Euler, Denoising strength: 0.4"}, "with --image"),
        "network": ({"fastsd": '{"prompt": "x", "model_path": "//host/share"}'}, "--model"),
    }
    for name, (texts, said) in cases.items():
        refused(cli("--from-image", write_image(tmp_path / f"{name}.png", **texts)), said)
    refused(cli("--from-image", tmp_path / "none.png"), "--from-image", "no such file")
    assert os.listdir() == []


# What is refused


def test_no_prompt(cli: Callable) -> None:
    for words in ([], ["--steps", "3"]):
        refused(cli(*words), "--prompt", "say what to generate")
    refused(cli("--prompt", "a\udc80b"), "--prompt", "UTF-8")


def test_what_is_no_model(cli: Callable, model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "broken")
    weights = tmp_path / "broken" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    shutil.copytree(model, tmp_path / "partial")
    shutil.rmtree(tmp_path / "partial" / "vae")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("x")
    for name in ("none", "empty", "file.txt", "broken", "partial"):
        refused(cli("-p", "x", "-m", tmp_path / name), name)
    refused(cli("-p", "x", "-m", tmp_path / "none"), "--model", "no such model")
    assert os.listdir() == []


def test_what_the_model_refuses_is_in_words_of_the_command_line(cli: Callable, model: Path) -> None:
    base = ("-p", "x", "-m", model)
    refused(cli(*base, "-W", 63), "--width is 63", "56 or 64")
    refused(cli(*base, "--clip-skip", 3), "--clip-skip is 3")
    refused(cli(*base, "--sampler", "euler", "--eta", 0.5), "--eta")
    refused(cli(*base, "--sampler", "ddim", "--schedule", "karras"), "--schedule")
    refused(cli(*base, "--device", "cuda:99"), "--device")
    assert os.listdir() == []


def test_images_and_masks_that_are_none(cli: Callable, model: Path, photo: Path, mask: Path) -> None:
    cut, text = photo.with_name("cut.png"), photo.with_name("text.png")
    Image.effect_noise((64, 64), 90).save(cut)
    cut.write_bytes(cut.read_bytes()[:-900])
    text.write_text("hello")
    base = ("-p", "x", "-m", model)
    wide, bomb = photo.with_name("wide.png"), photo.with_name("bomb.png")
    Image.new("RGB", (8200, 16)).save(wide)
    Image.new("1", (20_000, 20_000)).save(bomb)  # 50 KB
    refused(cli(*base, "--image", wide), "--image: 8200x16 pixels", "8192 a side")
    refused(cli(*base, "--image", bomb), "--image", "bomb.png", "134 million")
    refused(cli(*base, "--image", photo, "--mask", bomb), "--mask", "bomb.png", "134 million")
    assert cli(*base, "--image", wide, "-W", 64, "-H", 64).code == 0
    shutil.rmtree("outputs")
    refused(cli(*base, "--image", cut), "--image", "cut.png", "cut short")
    refused(cli(*base, "--image", photo, "--mask", text), "--mask", "text.png", "not an image")
    refused(cli(*base, "--image", photo.with_name("none.png")), "--image", "none.png", "no such file")
    refused(cli(*base, "--image", photo.parent), "--image", "a folder")
    refused(cli(*base, "--mask", mask), "--mask", "without --image")
    refused(cli(*base, "--strength", 0.5), "--strength", "without --image")
    refused(cli(*base, "--image", photo, "--strength", 1.5), "--strength", "0 to 1")
    assert os.listdir() == []


def test_an_output_that_cannot_be_written_is_found_before_the_work(cli: Callable, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for where in (tmp_path / "file" / "a.png", tmp_path / "file", "/proc/nowhere/a.png", "a.bmp"):
        refused(cli("-p", "x", "-m", "no model, not looked at", "-o", where), "--output")


def test_a_full_disk_is_one_line(cli: Callable, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    refused(cli("-p", "x", "-m", model), "--output", "the disk is full")
    assert os.listdir() == []


@pytest.mark.parametrize(
    ("error", "count", "said"),
    [
        (MemoryError(), 4, "--batch-size 2"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            1,
            "32x32 would take less",
        ),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"), 1, "32x32 would take less"),
    ],
)
def test_too_little_memory_says_what_to_try(
    cli: Callable, model: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, count: int, said: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("fastsd.generate.batch.Batch.denoise", fail)
    refused(cli("-p", "x", "-m", model, "--count", count), "not enough memory", said)
    monkeypatch.setattr("fastsd.pipeline.load_checkpoint", fail)
    refused(cli("-p", "x", "-m", model, "--dtype", "fp32"), "not enough memory for the model", "--dtype fp16")
    assert os.listdir() == []


def test_an_image_that_cannot_fit_is_refused_before_it_is_generated(
    cli: Callable, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastsd.runtime.memory.available", lambda device: 200_000_000)
    refused(cli("-p", "x", "-m", model, "-W", 8192, "-H", 8192), "would fit")


def test_a_model_that_cannot_fit_is_refused_before_it_is_loaded(
    cli: Callable, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastsd.runtime.memory.available", lambda device: 2_000_000)
    base = ("-p", "x", "-m", model, "--device", "cpu")
    refused(cli(*base, "--dtype", "fp32"), f"--model {model}", "GiB in fp32", "are free on cpu")
    assert os.listdir() == []


def test_debug_shows_the_traceback(cli: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSD_DEBUG", "1")
    ran = cli("--steps", "3")
    assert ran.code == 2 and "Traceback" in ran.err and ran.err.splitlines()[-1].startswith("fastsd: error: --prompt")


def test_a_mistake_of_our_own_is_not_hidden(cli: Callable, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastsd.cli.generate.write_texts", lambda settings: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli("-p", "x", "-m", model)
    assert os.listdir() == []


# Interruption


def test_ctrl_c_while_an_image_is_written_leaves_nothing_of_it(
    cli: Callable, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = []

    def interrupt(descriptor: int) -> None:
        done.append(descriptor)
        if len(done) > 2:  # the first image takes two, its file and its folder
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    ran = cli("-p", "x", "-m", model, "-s", 1, "--count", 3, "-b", 1)
    assert (ran.code, ran.err) == (130, "fastsd: interrupted\n")
    assert os.listdir("outputs") == ["00000-1-x.png"] and ran.paths == [Path("outputs/00000-1-x.png")]


def test_ctrl_c_stops_a_real_run(model: Path, tmp_path: Path) -> None:
    """SIGINT in the middle of the loop: exit code 130, the finished images whole, nothing else."""
    command = [
        sys.executable,
        "-m",
        "fastsd",
        "-p",
        "x",
        "-m",
        model,
        "--count",
        "1000",
        "-b",
        "1",
        "-o",
        tmp_path / "a",
    ]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    # The handler is set anew: where this test runs in the background, SIGINT is ignored and a child inherits that.
    restore = "import signal, sys, runpy; signal.signal(signal.SIGINT, signal.default_int_handler); "
    command[1:3] = ["-c", restore + "runpy.run_module('fastsd', run_name='__main__')"]
    with subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        assert run.stdout is not None and run.stderr is not None
        run.stdout.readline()  # an image is done, so it is in the loop
        time.sleep(0.05)
        run.send_signal(signal.SIGINT)
        paths, err = run.communicate(timeout=30)
    assert run.returncode == 130 and err.decode() == "fastsd: interrupted\n"
    files = sorted(os.listdir(tmp_path / "a"))
    assert 1 <= len(files) < 1000 and all(name.endswith(".png") and not name.startswith(".") for name in files)
    for name in files:
        assert images.open_image(tmp_path / "a" / name).size == (64, 64)


@pytest.mark.skipif(
    not (ROOT / "fastsd" / "assets" / "digits" / "model_index.json").is_file(), reason="needs the model"
)
def test_the_bundled_model_generates_and_repeats(cli: Callable) -> None:
    first = cli("--prompt", "a handwritten eight", "--seed", 7)
    assert (first.code, first.err) == (0, "") and pixels(first.paths[0]).shape == (64, 64, 3)
    assert cli("--prompt", "a handwritten eight", "--seed", 7, "--model", "digits").code == 0
    again = cli("--from-image", first.paths[0])
    np.testing.assert_array_equal(pixels(again.paths[0]), pixels(first.paths[0]))
    assert "note: " in cli("--prompt", "a purple eight").err
