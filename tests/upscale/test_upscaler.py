"""`fastsd.Upscaler`: sizes, transparency, colours, memory, precision, and what is refused."""

from __future__ import annotations

import io
import pickle
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fastsd
from fastsd.errors import FastsdError
from fastsd.model.upscalers import CompactNet, make_network
from fastsd.runtime import memory
from fastsd.upscale.upscaler import Upscaler, mirrored
from tests.support.upscalers import TINY_COMPACT, TINY_RRDB, computed, random_state, write_upscaler


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    array = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.merge(mode, [Image.fromarray(array[:, :, i]) for i in range(channels)])


def doubling(channels: int = 3) -> Upscaler:
    """A compact network whose weights are zero: what it adds to the image enlarged by nearest neighbour is nothing."""
    config = replace(TINY_COMPACT, channels=channels)
    network = CompactNet(config).eval().requires_grad_(False)
    network.load_state_dict({key: torch.zeros_like(tensor) for key, tensor in network.state_dict().items()})
    return Upscaler(network, "doubling")


def nearest(image: Image.Image, factor: int = 2) -> np.ndarray:
    return np.asarray(image).repeat(factor, 0).repeat(factor, 1)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_upscaler(tmp_path_factory.mktemp("upscaler") / "tiny.safetensors")


def test_a_file(file: Path) -> None:
    """It gives what the network computes, rounded to 8 bits."""
    upscaler = fastsd.Upscaler.from_file(file, device="cpu")
    assert (upscaler.name, upscaler.scale, upscaler.dtype) == ("tiny", 2, torch.float32)
    image = noise(19, 11)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    expected = computed(TINY_COMPACT, random_state(TINY_COMPACT), pixels)[0].clamp(0, 1).permute(1, 2, 0).numpy() * 255
    assert np.abs(np.asarray(upscaler(image)) - expected).max() <= 0.5 + 255 * 1e-5  # half a unit, and rounding in fp32


@pytest.mark.parametrize(
    ("arguments", "size"),
    [
        ({}, (62, 34)),
        ({"scale": 1}, (31, 17)),
        ({"scale": 0.25}, (8, 4)),
        ({"scale": 1.5}, (46, 26)),
        ({"scale": 3}, (93, 51)),  # the network runs twice
        ({"scale": 16}, (496, 272)),
        ({"size": (50, 100)}, (50, 100)),
    ],
)
def test_sizes(arguments: dict[str, Any], size: tuple[int, int]) -> None:
    image = noise(31, 17)
    seen: list[tuple[int, int]] = []
    found = doubling()(image, **arguments, progress=lambda done, total: seen.append((done, total)))
    assert found.size == size and found.mode == "RGB"
    runs = {"scale": {3: 2, 16: 4}.get(arguments.get("scale", 0), 1), "size": 3}
    wanted = runs["size"] if "size" in arguments else runs["scale"]
    assert seen == [(i + 1, wanted) for i in range(wanted)]


def test_twice_and_a_shrink_are_lanczos_of_twice() -> None:
    image = noise(31, 17)
    four = Image.fromarray(nearest(image, 4))
    assert np.array_equal(doubling()(image, 3), four.resize((93, 51), Image.Resampling.LANCZOS))


def test_transparency_is_enlarged_too() -> None:
    image = noise(20, 12, "RGBA")
    found = doubling()(image)
    assert found.mode == "RGBA" and np.array_equal(np.asarray(found), nearest(image))
    image.putalpha(255)
    assert doubling()(image).mode == "RGB"  # nothing of it is seen


MODES = {
    "grey": (lambda: noise(9, 7, "L"), lambda image: nearest(image.convert("RGB"))),
    "grey with transparency": (lambda: noise(9, 7, "LA"), lambda image: nearest(image.convert("RGBA"))),
    "palette": (lambda: noise(9, 7).quantize(16), lambda image: nearest(image.convert("RGB"))),
    "black and white": (lambda: noise(9, 7, "L").convert("1"), lambda image: nearest(image.convert("RGB"))),
    "CMYK": (lambda: noise(9, 7).convert("CMYK"), lambda image: nearest(image.convert("RGB"))),
    "16 bits": (
        lambda: Image.fromarray(np.asarray(noise(9, 7, "L")).astype(np.uint16) * 257),
        lambda image: nearest(Image.fromarray((np.asarray(image) // 257).astype(np.uint8)).convert("RGB")),
    ),
    "one pixel": (lambda: noise(1, 1), nearest),
    "a line": (lambda: noise(1000, 1), nearest),
}


@pytest.mark.parametrize("name", MODES)
def test_images_of_every_mode(name: str) -> None:
    make, expected = MODES[name]
    image = make()
    assert np.array_equal(np.asarray(doubling()(image)), expected(image))


def test_a_network_for_grey_images_enlarges_the_brightness() -> None:
    """A network that changes nothing changes nothing, but for Pillow's rounding on the way to YCbCr and back."""
    grey = noise(20, 12, "L")
    found = np.asarray(doubling(1)(grey)).astype(int)
    assert np.abs(found - nearest(grey.convert("RGB"))).max() <= 1
    colours = Image.new("RGB", (16, 16), (200, 60, 20))
    found = np.asarray(doubling(1)(colours)).astype(int)
    assert np.abs(found - (200, 60, 20)).max() <= 2  # to YCbCr and back, in 8 bits


def test_odd_sides_of_a_network_that_unshuffles() -> None:
    """The image is mirrored as the network's own program does it, and the result cut."""
    config = replace(TINY_RRDB, unshuffle=2)
    module = make_network(config).eval().requires_grad_(False)
    module.load_state_dict(random_state(config))
    image = noise(21, 13)
    found = Upscaler(module)(image)
    assert found.size == (42, 26)
    pixels = torch.from_numpy(mirrored(np.asarray(image), 2)).permute(2, 0, 1)[None] / 255
    expected = computed(config, random_state(config), pixels)[0].clamp(0, 1).permute(1, 2, 0).numpy() * 255
    assert np.abs(np.asarray(found) - expected[:26, :42]).max() <= 0.5 + 255 * 1e-5
    assert mirrored(np.zeros((1, 1, 3), np.uint8), 4).shape == (4, 4, 3)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "0": ({"scale": 0}, "scale: it should be a number from 0.25 to 16|from 0.25 to 16"),
    "nan": ({"scale": float("nan")}, "from 0.25 to 16"),
    "infinite": ({"scale": float("inf")}, "from 0.25 to 16"),
    "a text": ({"scale": "2"}, "from 0.25 to 16"),
    "far too much": ({"scale": 17}, "from 0.25 to 16"),
    "both": ({"scale": 2, "size": (4, 4)}, "either says how large"),
    "no size": ({"size": (4, 0)}, "a whole number from 1 to"),
    "no pair": ({"size": 4}, r"it should be \(width, height\)"),
    "a small tile": ({"tile": 8}, "a whole number from 64 to"),
    "an unknown argument": ({"factor": 2}, "no such argument"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str) -> None:
    arguments, message = BAD[name]
    with pytest.raises(FastsdError, match=message):
        doubling()(noise(4, 4), **arguments)


@pytest.mark.parametrize("image", ["a.png", None, Image.new("RGB", (0, 4))], ids=["a path", "none", "no pixels"])
def test_what_is_no_image(image: Any) -> None:
    with pytest.raises(FastsdError, match="a PIL image with pixels"):
        doubling()(image)


def test_an_opened_file_that_is_cut_short() -> None:
    data = io.BytesIO()
    noise(64, 64).save(data, "PNG")
    with pytest.raises(FastsdError, match="image: its file is damaged, cut short"):
        doubling()(Image.open(io.BytesIO(data.getvalue()[:600])))


def test_memory_bounds_the_tile_and_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is computed of what does not fit; the largest tile that fits is taken."""
    upscaler, ran = doubling(), []
    run = upscaler._run
    monkeypatch.setattr(upscaler, "_run", lambda part: ran.append(part.shape) or run(part))
    needed = TINY_COMPACT.numbers_a_pixel * 4
    monkeypatch.setattr(memory, "available", lambda device: 200 * 200 * needed)
    upscaler(noise(300, 300))
    assert {shape[:2] for shape in ran} == {(192, 192)}
    ran.clear()
    monkeypatch.setattr(memory, "available", lambda device: 100 * 200 * 4 * 12 - 1)
    with pytest.raises(FastsdError, match="the result is computed at 400x200, which takes 0.0 GiB"):
        upscaler(noise(200, 100))
    monkeypatch.setattr(memory, "available", lambda device: 64 * 64 * needed - 1)
    with pytest.raises(FastsdError, match="a tile takes .* close other programs"):
        upscaler(noise(150, 100))
    assert ran == []


def test_memory_that_runs_out_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    upscaler = doubling()

    def run(part: np.ndarray) -> np.ndarray:
        raise MemoryError

    monkeypatch.setattr(upscaler, "_run", run)
    with pytest.raises(FastsdError, match="not enough memory to enlarge 9x7"):
        upscaler(noise(9, 7))


def test_what_overflows_runs_in_fp32(file: Path) -> None:
    """A hidden value of 10^5, past fp16's 65504, of which the last layer takes 10^-7."""
    config = replace(TINY_COMPACT, convolutions=0)
    state = {key: torch.zeros_like(tensor) for key, tensor in random_state(config).items()}
    state["body.0.bias"][0], state["body.2.bias"][:] = 6e4, 0.25
    state["body.0.weight"][0, 0, 1, 1] = 6e4
    network = CompactNet(config).eval().requires_grad_(False)
    network.load_state_dict(state)
    upscaler = Upscaler(network.half())
    found = upscaler(Image.new("RGB", (5, 4), (255, 0, 0)))
    assert upscaler.dtype == torch.float32
    assert upscaler.take_notes() == ["the upscaler overflowed in fp16; it runs in fp32 from now on"]
    assert np.asarray(found)[0, 0].tolist() == [255, 64, 64] and not upscaler.take_notes()


def test_weights_of_no_use() -> None:
    upscaler = doubling()
    with torch.no_grad():
        upscaler.network.body[0].bias[0] = float("inf")  # type: ignore[index]
    with pytest.raises(FastsdError, match="the upscaler's result is not finite"):
        upscaler(noise(4, 4))


def test_it_is_pickled_and_called_by_several_threads(file: Path) -> None:
    upscaler = pickle.loads(pickle.dumps(fastsd.Upscaler.from_file(file, device="cpu")))
    assert upscaler.name == "tiny"
    images = [noise(20 + i, 16, seed=i) for i in range(6)]
    expected = [np.asarray(upscaler(image)) for image in images]
    found: dict[int, np.ndarray] = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: np.asarray(upscaler(images[i]))}))
        for i in range(len(images))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(found[i], expected[i]) for i in range(len(images)))


def test_the_callers_settings_change_nothing(file: Path) -> None:
    upscaler = fastsd.Upscaler.from_file(file, device="cpu")
    image = noise(20, 16)
    expected = np.asarray(upscaler(image))
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        assert np.array_equal(np.asarray(upscaler(image)), expected)
