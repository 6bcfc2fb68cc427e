"""`fastsd upscale`: files, folders, settings that stay, names that are taken, and mistakes, each in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from safetensors.torch import save_file

from fastsd.cli import main
from fastsd.image.files import encode, read_text
from fastsd.image.metadata import read_texts, write_texts
from tests.support.cli import pixels, refused, settings
from tests.support.upscalers import TINY_COMPACT, random_state, write_upscaler

SETTINGS = {
    "prompt": "a fort, ünïcode",
    "seed": 7,
    "num_inference_steps": 20,
    "sampler": "euler",
    "width": 16,
    "height": 12,
}


@pytest.fixture(scope="module")
def upscaler(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_upscaler(tmp_path_factory.mktemp("upscaler") / "4x-Sharp, v2.safetensors"))


def image(path: Path, texts: dict[str, str] | None = None, size: tuple[int, int] = (16, 12), mode: str = "RGB") -> Path:
    array = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    path.write_bytes(encode(Image.fromarray(array).convert(mode), path.suffix, texts or {}))
    return path


def upscale(*words: object) -> int:
    return main(["upscale", "--device", "cpu", "--no-progress", *map(str, words)])


def test_an_image_with_its_settings(upscaler: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What generated it stays in it, so that it can be repeated; that it was enlarged is beside that, as in A1111."""
    texts = write_texts(SETTINGS) | {"workflow": '{"nodes": []}'}
    source = image(tmp_path / "fort.png", texts)
    assert upscale(source, "--upscaler", upscaler, "--scale", 3, "-o", tmp_path / "large.png") == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "large.png")
    found = read_text(tmp_path / "large.png")
    said = found.pop("postprocessing")
    assert said == 'Postprocess upscale by: 3, Postprocess upscaler: "4x-Sharp, v2"'
    assert found == texts and read_texts(found)[0]["seed"] == 7
    assert pixels(tmp_path / "large.png").shape == (36, 48, 3)


def test_other_formats_say_it_with_the_settings(upscaler: str, tmp_path: Path) -> None:
    source = image(tmp_path / "fort.png", write_texts(SETTINGS))
    assert upscale(source, "--upscaler", upscaler, "-o", tmp_path / "large.webp") == 0
    found = read_text(tmp_path / "large.webp")["parameters"]
    assert found.startswith("a fort, ünïcode\nSteps: 20") and found.endswith('Postprocess upscaler: "4x-Sharp, v2"')


def test_a_folder_and_files(upscaler: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each becomes a PNG of its name; a camera's orientation and transparency are kept."""
    (tmp_path / "in").mkdir()
    image(tmp_path / "in" / "a.png", mode="RGBA")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(pixels(image(tmp_path / "b.png"))).save(tmp_path / "in" / "b.jpg", exif=exif)
    (tmp_path / "in" / "notes.txt").write_text("no image")
    other = image(tmp_path / "c.webp")
    assert upscale(tmp_path / "in", other, "--upscaler", upscaler, "--out", tmp_path / "out") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "b.png", "c.png"]
    assert len(capsys.readouterr().out.splitlines()) == 3
    shapes = {path.name: pixels(path).shape for path in (tmp_path / "out").iterdir()}
    assert shapes == {"a.png": (24, 32, 4), "b.png": (32, 24, 3), "c.png": (24, 32, 3)}


def test_nothing_is_replaced(upscaler: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = image(tmp_path / "a.png"), image(tmp_path / "b.png")
    out = tmp_path / "out"
    assert upscale(first, "--upscaler", upscaler, "-o", out) == 0
    before = (out / "a.png").read_bytes()
    assert upscale(first, second, "--upscaler", upscaler, "-o", out) == 2
    assert "a.png: the file exists already; --skip-existing leaves it out" in capsys.readouterr().err
    assert not (out / "b.png").exists()
    assert upscale(first, second, "--upscaler", upscaler, "-o", out, "--skip-existing") == 0
    assert (out / "b.png").exists() and (out / "a.png").read_bytes() == before
    assert upscale(first, second, "--upscaler", upscaler, "-o", out, "--skip-existing") == 0
    assert "every result is there" in capsys.readouterr().err
    assert upscale(first, "--upscaler", upscaler, "-o", first) == 2
    assert "the file exists already; give another" in capsys.readouterr().err


def test_one_of_several_is_damaged(upscaler: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The others are enlarged all the same."""
    whole = image(tmp_path / "whole.png", size=(40, 40))
    (tmp_path / "half.png").write_bytes(whole.read_bytes()[:2000])
    (tmp_path / "text.png").write_text("no image")
    files = (tmp_path / "half.png", tmp_path / "text.png", whole)
    assert upscale(*files, "--upscaler", upscaler, "-o", tmp_path / "out") == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["whole.png"]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "half.png: the image is damaged or cut short" in lines[0]
    assert "text.png: not an image that can be read" in lines[1]


def test_transparency_in_a_format_without(upscaler: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = image(tmp_path / "a.png", mode="RGBA")
    assert upscale(source, "--upscaler", upscaler, "-o", tmp_path / "b.jpg") == 0
    assert "note: a.png: .jpg holds no transparency; transparent pixels are white" in capsys.readouterr().err


BAD = {
    "no image": (["none.png"], "none.png: no such file or folder"),
    "an empty folder": (["empty"], "empty: a folder without images"),
    "a factor of 0": (["a.png", "--scale", "0"], "--scale is '0'; it should be a number from 0.25 to 16"),
    "a factor that is no number": (["a.png", "--scale", "nan"], "--scale is 'nan'; it should be a number"),
    "a tile of 1": (["a.png", "--tile", "1"], "--tile is '1'; it should be a whole number from 64"),
    "a device": (["a.png", "--device", "tpu"], "--device is 'tpu'; it should be auto, cpu"),
    "one name for two": (["a.png", "more/A.jpg"], "A.jpg: its result would be A.png, as that of "),
    "a format": (["a.png", "-o", "a.bmp"], "--output a.bmp: .bmp is not written"),
    "a wide one for WebP": (["wide.png", "-o", "wide.webp"], "40000x2 pixels are more than .webp holds; use .png"),
    "no upscaler": (["a.png", "--upscaler", "none.pth"], "--upscaler none.pth: no such"),
    "a checkpoint": (
        ["a.png", "--upscaler", "checkpoint.safetensors"],
        "a checkpoint of Stable Diffusion; use it with --model",
    ),
    "an image as upscaler": (["a.png", "--upscaler", "a.png"], "--upscaler a.png: a PNG image, not weights"),
    "a pickle": (["a.png", "--upscaler", "x.pth"], "allow it with --allow-pickle"),
    "half a file": (["a.png", "--upscaler", "half.safetensors"], "download it again"),
    "a folder as upscaler": (["a.png", "--upscaler", "empty"], "empty: a folder"),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes(
    name: str, upscaler: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words, message = BAD[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "more").mkdir()
    image(tmp_path / "a.png")
    image(tmp_path / "more" / "A.jpg")
    image(tmp_path / "wide.png", size=(20000, 1))
    torch.save(random_state(TINY_COMPACT), tmp_path / "x.pth")
    whole = Path(upscaler).read_bytes()
    (tmp_path / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    save_file({"model.diffusion_model.out.2.weight": torch.zeros(2)}, tmp_path / "checkpoint.safetensors")
    given = ["--upscaler", upscaler] if "--upscaler" not in words else []
    before = sorted(tmp_path.rglob("*"))
    assert upscale(*words, *given) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("fastsd: error: ")
    assert sorted(tmp_path.rglob("*")) == before


def test_of_an_animation_the_first_image_is_taken(
    upscaler: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frames = [Image.new("L", (8, 6), 40 * i) for i in range(3)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert upscale(tmp_path / "a.gif", "--upscaler", upscaler, "-o", tmp_path / "out") == 0
    assert "note: a.gif: it holds 3 images, of which the first is taken" in capsys.readouterr().err
    assert pixels(tmp_path / "out" / "a.png").shape == (12, 16, 3)


def test_a_pickle_that_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"params_ema": random_state(TINY_COMPACT)}, tmp_path / "x.pth")
    image(tmp_path / "a.png")
    assert upscale("a.png", "--upscaler", "x.pth", "--allow-pickle") == 0
    assert (tmp_path / "upscaled" / "a.png").exists()


def test_a_very_wide_image(upscaler: str, tmp_path: Path) -> None:
    """20,000 pixels, in tiles."""
    source = image(tmp_path / "wide.png", size=(20000, 3))
    assert upscale(source, "--upscaler", upscaler, "-o", tmp_path / "large.png") == 0
    assert pixels(tmp_path / "large.png").shape == (6, 40000, 3)


@pytest.mark.heavy
def test_the_hires_fix_with_a_file(cli: Callable[..., Any], model: Path, upscaler: str, tmp_path: Path) -> None:
    """It is read once the flags are right; the image holds its name, and is repeated when the file is given again."""
    flags = ["-p", "a cat", "-m", model, "--device", "cpu", "--seed", 3, "--hires", 1.5]
    damaged = tmp_path / "half.safetensors"
    damaged.write_bytes(Path(upscaler).read_bytes()[:-9])
    refused(cli(*flags, "--hires-upscaler", damaged), f"--hires-upscaler {damaged}: not a complete safetensors file")
    refused(cli(*flags, "--hires-upscaler", "none.pth"), "--hires-upscaler none.pth: no such file; give latent, ")
    (first,) = cli(*flags, "--hires-upscaler", upscaler).paths
    assert settings(first)["hires_upscaler"] == "4x-Sharp, v2" and pixels(first).shape == (96, 96, 3)
    assert 'Hires upscaler: "4x-Sharp, v2"' in read_text(first)["parameters"]
    refused(cli("--from-image", first), "generated with --hires-upscaler '4x-Sharp, v2'; give that file, or lanczos")
    (again,) = cli("--from-image", first, "--hires-upscaler", upscaler).paths
    assert np.array_equal(pixels(first), pixels(again))
