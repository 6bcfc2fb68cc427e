"""ControlNets, the refiner and the second pass from the command line, and in an image's metadata."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

from fastsd import Control, Pipeline
from fastsd.cli.controls import differences
from tests.support import tiny
from tests.support.cli import refused

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two random ControlNets for the tiny model."""
    files = [tmp_path_factory.mktemp("nets") / f"net{i}.safetensors" for i in range(2)]
    for i, file in enumerate(files):
        save_file(tiny.controlnet(tiny.UNET, seed=i), file)
    return files


@pytest.fixture
def maps(tmp_path: Path) -> list[Path]:
    random = np.random.RandomState(0)
    files = [tmp_path / f"map{i}.png" for i in range(2)]
    for file in files:
        Image.fromarray(random.randint(0, 256, (64, 64, 3), dtype=np.uint8)).save(file)
    return files


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def stored(path: Path) -> dict:
    with Image.open(path) as image:
        return json.loads(image.text["fastsd"])


def test_what_the_pipeline_generates(cli: Callable, model: Path, nets: list[Path], maps: list[Path]) -> None:
    """Several, each with the values at its place; what is not given is as usual."""
    words = ("-p", "x", "-m", model, "-s", 1, "--dtype", "fp32", "--steps", 4)
    ran = cli(
        *words,
        *("--control", nets[0], "--control-image", maps[0], "--control-weight", 0.5, "--control-end", 0.5),
        *("--control", nets[1], "--control-image", maps[1]),
    )
    pipe = Pipeline.from_pretrained(model, dtype="fp32")
    loaded = [pipe.load_controlnet(net) for net in nets]
    photos = [Image.open(file).convert("RGB") for file in maps]
    controls = [Control(loaded[0], photos[0], weight=0.5, end=0.5), Control(loaded[1], photos[1])]
    wanted = pipe("x", seed=1, num_inference_steps=4, controls=controls).images[0]
    np.testing.assert_array_equal(pixels(ran.paths[0]), np.asarray(wanted))
    assert (pixels(cli(*words).paths[0]) != np.asarray(wanted)).any()


def test_an_image_remembers_its_controls(cli: Callable, model: Path, nets: list[Path], maps: list[Path]) -> None:
    given = ("--control", nets[0], "--control-image", maps[0])
    first = cli("-p", "x", "-m", model, "-s", 1, *given, "--control-weight", 0.5).paths[0]
    assert stored(first)["controls"][0]["weight"] == 0.5 and stored(first)["controls"][0]["name"] == "net0.safetensors"
    refused(cli("--from-image", first), "it was generated with --control 'net0.safetensors'; give that")
    again = cli("--from-image", first, *given)
    assert again.err == ""
    np.testing.assert_array_equal(pixels(again.paths[0]), pixels(first))
    other = cli("--from-image", first, "--control", nets[1], "--control-image", maps[1])
    assert "--control is another file" in other.err and "--control-image is another image than" in other.err


def test_the_size_is_the_first_maps(cli: Callable, model: Path, nets: list[Path], tmp_path: Path) -> None:
    Image.new("RGB", (75, 50), "red").save(tmp_path / "odd.png")
    words = ("-p", "x", "-m", model, "--control", nets[0], "--control-image", tmp_path / "odd.png")
    ran = cli(*words)
    assert pixels(ran.paths[0]).shape == (48, 72, 3) and "resized from 75x50 to 72x48" in ran.err
    assert pixels(cli(*words, "-W", 64, "-H", 64).paths[0]).shape == (64, 64, 3)


def test_edges(cli: Callable, model: Path, nets: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("cv2")
    area = np.zeros((64, 64, 3), dtype=np.uint8)
    area[16:48, 16:48] = 255
    Image.fromarray(area).save(tmp_path / "square.png")
    words = ("-p", "x", "-m", model, "-s", 1, "--control", nets[0])
    found = cli(*words, "--control-canny", tmp_path / "square.png").paths[0]
    from fastsd.image.control_maps import find_edges

    edges = find_edges(Image.fromarray(area))
    drawn = np.asarray(edges)[..., 0]
    # The outline and nothing else: Canny's edge is one pixel wide, and may lie on either side of the step.
    near = np.zeros((64, 64), dtype=bool)
    near[15:49, 15:49] = True
    near[18:46, 18:46] = False
    assert (drawn[~near] == 0).all() and set(np.unique(drawn)) == {0, 255}
    assert (drawn[20:44, 14:20].max(axis=1) == 255).all() and (drawn[20:44, 44:50].max(axis=1) == 255).all()
    edges.save(tmp_path / "edges.png")
    given = cli(*words, "--control-image", tmp_path / "edges.png").paths[0]
    np.testing.assert_array_equal(pixels(found), pixels(given))


def test_colours(cli: Callable, model: Path, nets: list[Path], maps: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("cv2")
    from fastsd.image.control_maps import color_grid

    words = ("-p", "x", "-m", model, "-s", 1, "--control", nets[0])
    found = cli(*words, "--control-color", maps[0]).paths[0]
    assert stored(found)["controls"][0]["map"] == "color"
    with Image.open(maps[0]) as image:
        color_grid(image).save(tmp_path / "grid.png")
    given = cli(*words, "--control-image", tmp_path / "grid.png").paths[0]
    np.testing.assert_array_equal(pixels(found), pixels(given))
    other = cli("--from-image", found, "--control", nets[0], "--control-image", maps[0])
    assert "--control-image is another image than" in other.err


def test_edges_of_earlier_versions() -> None:
    """They stored whether edges were made, and made no other map."""
    image = {"sha256": "1"}
    for old, now, same in ((True, "canny", True), (False, None, True), (True, None, False), (False, "color", False)):
        notes = differences({"controls": [{"image": image, "edges": old}]}, [{"image": image, "map": now}])
        assert (notes == []) == same


def test_edges_without_opencv(
    cli: Callable, model: Path, nets: list[Path], maps: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    ran = cli("-p", "x", "-m", model, "--control", nets[0], "--control-canny", maps[0])
    refused(ran, "OpenCV", "pip install 'fastsd[control]'")


def test_controls_that_cannot_be(cli: Callable, model: Path, nets: list[Path], maps: list[Path]) -> None:
    base = ("-p", "x", "-m", model)
    one = (*base, "--control", nets[0], "--control-image", maps[0])
    refused(cli(*base, "--control", nets[0]), "each needs a --control-image (or --control-canny, --control-color), in")
    refused(cli(*base, "--control-image", maps[0]), "--control: 0 given with 1 images")
    refused(cli(*one, "--control-weight", 1, "--control-weight", 2), "--control-weight: given 2 times for 1")
    refused(cli(*one, "--control-weight", 11), "--control-weight is '11'; it should be a number from -10 to 10")
    refused(cli(*one, "--control-start", 0.8, "--control-end", 0.2), "--control-start of --control 1: 0.8 comes after")
    refused(cli(*base, "--control", "nowhere", "--control-image", maps[0]), "--control nowhere", "no such")
    refused(cli(*base, "--control", model, "--control-image", maps[0]), f"--control {model}")
    refused(cli(*base, "--control", nets[0], "--control-image", "no.png"), "--control-image no.png")
    refused(
        cli(*base, "--control", nets[0], "--control-image", nets[0]),
        "--control-image",
        "not an image that can be read",
    )


def test_a_net_for_latents_of_another_size(cli: Callable, nets: list[Path], maps: list[Path], tmp_path: Path) -> None:
    from fastsd.weights import save_folder

    save_folder(tiny.sd1(), tmp_path / "halving", torch.float32)
    words = ("-p", "x", "-m", tmp_path / "halving", "--control", nets[0], "--control-image", maps[0])
    refused(cli(*words), "--control 1: it shrinks its image to 1/8 and the model's autoencoder to 1/2")


def test_hires(cli: Callable, model: Path) -> None:
    words = ("-p", "x", "-m", model, "-s", 1, "--steps", 4)
    ran = cli(*words, "--hires", 1.5, "--hires-strength", 0.6, "--hires-upscaler", "lanczos", "--hires-steps", 5)
    assert pixels(ran.paths[0]).shape == (96, 96, 3)
    settings = stored(ran.paths[0])
    assert (settings["width"], settings["hires_scale"], settings["hires_steps"]) == (64, 1.5, 5)
    with Image.open(ran.paths[0]) as image:
        text = image.text["parameters"]
    assert "Denoising strength: 0.6" in text
    assert "Hires upscale: 1.5, Hires steps: 3, Hires upscaler: Lanczos" in text
    again = cli("--from-image", ran.paths[0])
    np.testing.assert_array_equal(pixels(again.paths[0]), pixels(ran.paths[0]))


def test_what_a_repeated_image_leaves_out(cli: Callable, model: Path, maps: list[Path], tmp_path: Path) -> None:
    """What cannot go with a flag that was given now: a second pass with --image, a refiner with another model."""
    enlarged = cli("-p", "x", "-m", model, "-s", 1, "--hires", 1.5).paths[0]
    again = cli("--from-image", enlarged, "--image", maps[0])
    assert again.err == "note: not repeated: --hires, as --image starts from an image\n"
    assert "hires_scale" not in stored(again.paths[0])
    refined = cli("-p", "x", "-m", model, "-s", 1, "--refiner", model).paths[0]
    again = cli("--from-image", refined, "-m", "digits")
    assert again.code == 0 and "refiner" not in stored(again.paths[0])
    assert "the refiner is not the one that generated the image ('tiny')" in again.err
    info = PngInfo()
    info.add_text("fastsd", json.dumps({"prompt": "x", "model": "digits", "seed": 1, "hires_strength": 0.5}))
    Image.new("RGB", (8, 8)).save(tmp_path / "half.png", pnginfo=info)
    assert "hires_strength" not in stored(cli("--from-image", tmp_path / "half.png").paths[0])


def test_a_refiner(cli: Callable, model: Path, tmp_path: Path) -> None:
    from fastsd.weights import load_folder, save_folder

    other = load_folder(model, torch.float32)
    with torch.no_grad():
        other.unet.conv_out.weight.mul_(0.5)
    save_folder(other, tmp_path / "other", torch.float32)
    words = ("-p", "x", "-m", model, "-s", 1, "--steps", 5)
    found = cli(*words, "--refiner", tmp_path / "other", "--refiner-switch", 0.4).paths[0]
    assert (pixels(found) != pixels(cli(*words).paths[0])).any()
    again = cli("--from-image", found)
    assert again.err == ""
    np.testing.assert_array_equal(pixels(again.paths[0]), pixels(found))
    (tmp_path / "other").rename(tmp_path / "moved")
    refused(cli("--from-image", found), "it was generated with --refiner", "give it again")


def test_passes_that_cannot_be(cli: Callable, model: Path, maps: list[Path]) -> None:
    base = ("-p", "x", "-m", model)
    refused(cli(*base, "--hires", 0.5), "--hires is '0.5'; it should be a number from 1 to 8")
    refused(cli(*base, "--hires-strength", 0.5), "--hires-strength: given without --hires")
    refused(cli(*base, "--hires", 2, "--image", maps[0]), "--hires: given with --image")
    refused(cli(*base, "--hires", 2, "--hires-upscaler", "esrgan"), "--hires-upscaler", "latent", "lanczos")
    refused(cli(*base, "--refiner-switch", 0.5), "--refiner-switch: given without --refiner")
    refused(cli(*base, "--refiner", "nowhere"), "--refiner nowhere: no such model")
