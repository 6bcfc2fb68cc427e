"""Folders of images with captions, and what is refused of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastsd.errors import FastsdError
from fastsd.evaluate.images import fit, read_images
from fastsd.train.sources import list_folder


def save(path: Path, size: tuple[int, int] = (8, 8)) -> None:
    Image.new("RGB", size, (10, 20, 30)).save(path)


def test_captions_beside_the_images(tmp_path: Path) -> None:
    for name in ("b", "a"):
        save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"the {name}\n")
    found = read_images(tmp_path)
    assert [(one.name, one.captions) for one in found.images] == [("a.png", ("the a",)), ("b.png", ("the b",))]
    assert next(found.pixels(range(1), (4, 4))).tolist() == np.full((4, 4, 3), (10, 20, 30)).tolist()


def test_the_hash_knows_captions_and_labels(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    hashes = set()
    for row in ({"text": "one"}, {"text": ["one", "two"]}, {"text": "one", "label": 1}):
        (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png"} | row))
        hashes.add(read_images(tmp_path).sha256)
    assert len(hashes) == 3


def test_the_middle_of_an_image_is_taken() -> None:
    image = Image.new("RGB", (30, 10), "red")
    image.paste("blue", (10, 0, 20, 10))
    assert (fit(image, (10, 10)) == (0, 0, 255)).all()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("nonsense", "line 1"),
        ('{"text": "x"}', "line 1"),
        ('{"file_name": "a.png", "text": []}', "line 1"),
        ('{"file_name": "a.png", "text": [1]}', "line 1"),
        ('{"file_name": "a.png", "text": "x", "label": -1}', "line 1"),
        ('{"file_name": "../other.png", "text": "x"}', "outside"),
        ('{"file_name": "b.png", "text": "x"}', "not there"),
        ("", "no images"),
    ],
)
def test_a_line_that_is_none(line: str, said: str, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    save(folder / "a.png")
    save(tmp_path / "other.png")
    (folder / "metadata.jsonl").write_text(line)
    with pytest.raises(FastsdError, match=said):
        read_images(folder)


def test_a_folder_without_images_or_captions(tmp_path: Path) -> None:
    with pytest.raises(FastsdError, match="no such folder"):
        read_images(tmp_path / "none")
    with pytest.raises(FastsdError, match="no images"):
        read_images(tmp_path)
    save(tmp_path / "a.png")
    with pytest.raises(FastsdError, match="no caption"):
        read_images(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(FastsdError, match="a.png"):
        next(read_images(tmp_path).pixels(range(1), (4, 4)))


def test_the_captions_are_those_of_training(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a red heart\n\n  heart, red \n")
    (found,) = read_images(tmp_path).images
    assert found.captions == list_folder(tmp_path)[0].captions == ("a red heart", "heart, red")


@pytest.mark.parametrize("read", [read_images, list_folder])
@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"a" * (2**16 + 1), "a.txt: has more than 65536 bytes"),
        ("metadata.jsonl", b"\xff\xfe", "is not UTF-8"),
        ("metadata.jsonl", b"[" * 100_000, "line 1 should be"),
    ],
)
def test_what_neither_evaluation_nor_training_reads(
    read: Callable[[Path], object], name: str, content: bytes, said: str, tmp_path: Path
) -> None:
    save(tmp_path / "a.png")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FastsdError, match=said):
        read(tmp_path)
