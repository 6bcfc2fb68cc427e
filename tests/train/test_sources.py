"""Lists of images in folders; what is wrong with one is a line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from fastsd.errors import FastsdError
from fastsd.train.sources import list_folder


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(folder / name)


def test_captions_beside_images(tmp_path: Path) -> None:
    make(tmp_path, "b.png", "sub/a.jpg", "c.png")
    (tmp_path / "b.txt").write_text("a red heart\n\n  heart, red \n")
    (tmp_path / "sub" / "a.txt").write_text("ein Äpfel", encoding="utf-8")
    samples = list_folder(tmp_path)
    assert [(s.name, s.captions) for s in samples] == [
        ("b.png", ("a red heart", "heart, red")), ("c.png", ()), ("sub/a.jpg", ("ein Äpfel",)),
    ]  # fmt: skip
    assert samples[0].read() == (tmp_path / "b.png").read_bytes()


def test_texts_of_other_encodings_and_files_of_the_system(tmp_path: Path) -> None:
    make(tmp_path, "a.png", "b.png", "__MACOSX/c.png")
    (tmp_path / "__MACOSX" / "c.png").rename(tmp_path / "__MACOSX" / "._a.png")
    (tmp_path / "a.txt").write_text("a caf\u00e9\r\n", encoding="utf-8-sig")
    (tmp_path / "b.txt").write_text("a caf\u00e9", encoding="utf-16")
    assert [(s.name, s.captions) for s in list_folder(tmp_path)] == [
        ("a.png", ("a caf\u00e9",)), ("b.png", ("a caf\u00e9",)),
    ]  # fmt: skip
    (tmp_path / "b.txt").write_text("a caf\u00e9", encoding="latin-1")
    with pytest.raises(FastsdError, match=r"b\.txt: captions should be UTF-8"):
        list_folder(tmp_path)
    line = json.dumps({"file_name": "a.png", "text": "one\u2028line"}, ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_text(line, encoding="utf-8-sig")
    assert list_folder(tmp_path)[0].captions == ("one\u2028line",)


def test_metadata(tmp_path: Path) -> None:
    make(tmp_path, "a.png", "b.png", "unnamed.png")
    lines = [{"file_name": "a.png", "text": ["one", "two"], "more": 1}, {"file_name": "b.png", "text": "three"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    assert [(s.name, s.captions) for s in list_folder(tmp_path)] == [("a.png", ("one", "two")), ("b.png", ("three",))]


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "line 1 should be"),
        ('{"text": "a"}', "line 1 should be"),
        ('{"file_name": "a.png", "text": 3}', "line 1: "),
        ('{"file_name": "../../etc/passwd", "text": "a"}', "outside of the folder"),
        ('{"file_name": "a.png"}', "1 images but no captions"),
    ],
)
def test_metadata_that_is_none(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "metadata.jsonl").write_text(text)
    with pytest.raises(FastsdError, match=message):
        list_folder(tmp_path)


def test_a_folder_without_images_or_captions(tmp_path: Path) -> None:
    with pytest.raises(FastsdError, match="no such folder"):
        list_folder(tmp_path / "nothing")
    with pytest.raises(FastsdError, match="no images"):
        list_folder(tmp_path)
    make(tmp_path, "a.png")
    with pytest.raises(FastsdError, match='1 images but no captions; "name.txt" beside'):
        list_folder(tmp_path)
