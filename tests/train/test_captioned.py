"""Image files as training images: damaged ones, buckets, augmentation, captions."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastsd.errors import FastsdError
from fastsd.train.captioned import CaptionedImages, make_buckets, nearest_bucket
from fastsd.train.settings import Augment, Data
from fastsd.train.sources import Sample, list_folder

DATA = Data(path="folder", resolution=32, max_bad=0)


def png(width: int, height: int, seed: int = 0) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def sample(data: bytes, name: str = "a.png", captions: tuple[str, ...] = ("a", "b")) -> Sample:
    return Sample(name, captions, lambda: data)


def make(samples: list[Sample], data: Data = DATA) -> tuple[CaptionedImages, list[str]]:
    lines: list[str] = []
    return CaptionedImages(samples, data, 8, lines.append), lines


def test_damaged_images_are_left_out_counted_and_named() -> None:
    good = [sample(png(32, 32, i), f"{i}.png") for i in range(8)]
    bad = [sample(png(32, 32)[:200], "cut.png"), sample(b"no image", "text.png")]
    images, lines = make([good[0], *bad, *good[1:]], replace(DATA, max_bad=0.2))
    assert len(images) == 8 and images.samples == good
    assert len(lines) == 1 and lines[0].startswith("2 of 10 images left out: cut.png (") and "text.png (" in lines[0]
    assert [name for name, _ in images.record()["left_out"]] == ["cut.png", "text.png"]
    for allowed in (0.1, 1):
        with pytest.raises(FastsdError, match="more than 1 images cannot be read: cut.png .*--max-bad"):
            make([*good, *bad], replace(DATA, max_bad=allowed))
    with pytest.raises(FastsdError, match="no image can be read"):
        make(bad, replace(DATA, max_bad=5))


def test_without_augmentation_pixels_are_those_of_the_file() -> None:
    data = png(32, 32)
    expected = np.asarray(Image.open(io.BytesIO(data)))
    # A budget of nothing: decoded anew each time.
    for images, _ in (make([sample(data)]), make([sample(data)], replace(DATA, memory_gb=0.0))):
        pixels, _ = images.pixels(np.array([0]), np.random.default_rng(0))
        assert np.array_equal(((pixels[0].numpy() + 1) * 127.5).round(), expected)


def test_augmentation_follows_its_generator() -> None:
    augment = Augment(crop=True, flip=True, rotation=10.0, colour=0.2)
    images, _ = make([sample(png(40, 32))], replace(DATA, augment=augment))
    rows = np.zeros(6, np.int64)
    first, again = (images.pixels(rows, np.random.default_rng(5))[0] for _ in range(2))
    assert first.shape == (6, 32, 32, 3) and first.abs().max() <= 1
    assert (first == again).all() and len({image.numpy().tobytes() for image in first}) == 6
    assert images.record()["augmentation"]["rotation"] == 10.0
    flips, _ = make([sample(png(32, 32))], replace(DATA, augment=Augment(flip=True)))
    seen = {image.numpy().tobytes() for image in flips.pixels(np.zeros(20, np.int64), np.random.default_rng(0))[0]}
    assert len(seen) == 2


def test_buckets_keep_the_aspect_ratio() -> None:
    buckets = make_buckets(64, 8)
    assert (64, 64) in buckets and all(h * w <= 64 * 64 and h % 8 == w % 8 == 0 for h, w in buckets)
    assert {(w, h) for h, w in buckets} == set(buckets) and all(0.5 <= h / w <= 2 for h, w in buckets)
    assert nearest_bucket(buckets, 1.02) == (64, 64)
    shapes = [(64, 64), (100, 50), (30, 60), (200, 201)]  # width, height
    images, _ = make([sample(png(w, h)) for w, h in shapes], replace(DATA, resolution=64, buckets=True))
    assert images.sizes[0] == images.sizes[3] == (64, 64)
    for row, (width, height) in enumerate(shapes):
        h, w = images.sizes[row]
        nearest = min(abs(np.log(a / b * width / height)) for a, b in buckets)
        assert abs(np.log(h / w * width / height)) == pytest.approx(nearest)
    assert sorted(row for group in images.groups() for row in group) == [0, 1, 2, 3]
    for group in images.groups():
        assert images.pixels(group, np.random.default_rng(0))[0].shape[1:3] == images.sizes[group[0]]


def test_captions_and_their_dropout() -> None:
    images, lines = make([sample(png(32, 32)), sample(png(32, 32), "bare.png", ())])
    random = np.random.default_rng(0)
    drawn = [images.caption(0, {}, random, 0.25) for _ in range(2000)]
    # Four standard deviations of a share of 2,000.
    assert drawn.count("") / 2000 == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 2000) ** 0.5)
    assert drawn.count("a") / 2000 == pytest.approx(0.375, abs=4 * (0.375 * 0.625 / 2000) ** 0.5)
    assert images.caption(2, {}, random, 0.0) in ("a", "b")  # the second copy of image 0
    assert images.caption(1, {}, random, 0.0) == ""
    assert lines == ["1 images have no caption and are trained without one, such as bare.png"]


def test_the_fingerprint_follows_pixels_and_captions() -> None:
    prints = {
        make([sample(png(32, 32, seed), captions=captions)])[0].fingerprint()
        for seed in (0, 1)
        for captions in (("a",), ("b",))
    }
    assert len(prints) == 4


def test_a_resolution_that_the_autoencoder_cannot_take() -> None:
    with pytest.raises(FastsdError, match="data.resolution is 30; it should be a multiple of 8"):
        make([sample(png(32, 32))], replace(DATA, resolution=30))


def test_masks_and_sizes_follow_the_crop(tmp_path: Path) -> None:
    """An image twice as wide as high: its middle is cut out, of the mask too; its own size and the corner are told."""
    (tmp_path / "masks").mkdir()
    (tmp_path / "images").mkdir()
    Image.new("RGB", (128, 64), "red").save(tmp_path / "images" / "a.png")
    (tmp_path / "images" / "a.txt").write_text("a caption")
    mask = Image.new("L", (128, 64))
    mask.paste(255, (64, 0, 128, 64))
    mask.save(tmp_path / "masks" / "a.png")
    data = Data(path=str(tmp_path / "images"), resolution=64, masks=str(tmp_path / "masks"))
    images = CaptionedImages(list_folder(tmp_path / "images"), data, 8, print)
    _, notes = images.pixels(np.array([0]), np.random.default_rng(0), notes=True)
    assert notes["original_size"].tolist() == [[64, 128]] and notes["crop"].tolist() == [[0, 32]]
    expected = np.zeros((64, 64), np.uint8)
    expected[:, 32:] = 255
    assert np.array_equal(notes["mask"][0].numpy(), expected)
    (tmp_path / "masks" / "a.png").unlink()
    with pytest.raises(FastsdError, match="a.png needs a mask of that name"):
        images.pixels(np.array([0]), np.random.default_rng(0), notes=True)
