"""The emoji data set: which images, which captions, which of them are held out, and what is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastsd.data.emoji import Emoji, describe, hold_out
from fastsd.data.emoji_font import Bitmap, render
from tests.support.cli import refused
from tests.support.fonts import bitmap, symbols, write_cldr, write_font


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The flags that name a tiny font, its licence and its CLDR."""
    folder = tmp_path_factory.mktemp("font")
    (folder / "OFL.txt").write_text("SIL OPEN FONT LICENSE")
    font = write_font(folder / "font.ttf")
    return [
        *("--font", str(font), "--font-licence", str(folder / "OFL.txt")),
        *("--cldr", str(write_cldr(folder / "node_modules"))),
    ]


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


def emoji() -> list[Emoji]:
    """The symbols with a bitmap each, without a font."""
    known = {text: (name, tuple(words)) for text, (name, words) in symbols().items()}
    return describe([Bitmap((text,), text.encode()) for text in known], known)


def test_the_command_writes_images_captions_and_licences(files: list[str], tmp_path: Path, cli: Any) -> None:
    out = tmp_path / "emoji"
    ran = cli("data", "emoji", *files, "--out", str(out), "--held-out", "0.2")
    assert ran.code == 0, ran.err
    train, held = rows(out / "train"), rows(out / "held_out")
    for folder, table in (("train", train), ("held_out", held)):
        names = {row["file_name"] for row in table}
        assert names == {path.name for path in (out / folder).glob("*.png")}
    assert {row["emoji"] for row in train + held} == set(symbols())
    heart = next(row for row in train if row["emoji"] == "\u2764")
    assert heart["file_name"] == "2764.png" and "a red heart" in heart["text"]
    with Image.open(out / "train" / "2764.png") as image:
        assert (image.size, image.mode) == ((64, 64), "RGB")
    record = json.loads((out / "dataset.json").read_text())
    assert record["counts"]["images"] == len(symbols()) and len(record["font"]["sha256"]) == 64
    assert (out / "LICENSE.font.txt").read_text() == "SIL OPEN FONT LICENSE"
    assert "UNICODE" in (out / "LICENSE.cldr.txt").read_text()


def test_the_same_flags_write_the_same_bytes(files: list[str], tmp_path: Path, cli: Any) -> None:
    for name in ("one", "two"):
        assert cli("data", "emoji", *files, "--out", str(tmp_path / name)).code == 0
    one, two = (
        {
            path.relative_to(tmp_path / name): path.read_bytes()
            for path in (tmp_path / name).rglob("*")
            if path.is_file()
        }
        for name in ("one", "two")
    )
    assert one == two


def test_what_is_wrong_is_said_in_a_line(files: list[str], tmp_path: Path, cli: Any) -> None:
    out = tmp_path / "emoji"
    words = ["data", "emoji", *files, "--out", str(out)]
    refused(cli("data", "emoticons", *files), "emoji")
    refused(cli(*words, "--cldr", str(tmp_path)), "--cldr", "npm install")
    refused(cli(*words, "--font", str(tmp_path / "none.ttf")), "--font", "no such file")
    (tmp_path / "text.ttf").write_text("no font")
    refused(cli(*words, "--font", str(tmp_path / "text.ttf")), "--font", "no font")
    refused(cli(*words, "--held-out", "0.9"), "--held-out", "0 to 0.5")
    refused(cli(*words, "--side", "4"), "--side", "8 to")
    assert not out.exists()
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    refused(cli(*words), "--overwrite")
    refused(cli(*words, "--overwrite"), "no data set")
    assert (out / "mine.txt").read_text() == "keep"


def test_a_caption_means_one_image() -> None:
    found = emoji()
    texts = [caption.text for one in found for caption in one.captions]
    assert len(texts) == len(set(texts))
    assert all(text.isascii() and text == text.lower() for text in texts)
    by_text = {one.text: {caption.text: caption.form for caption in one.captions} for one in found}
    assert by_text["\u2764"]["heart, red"] == "order"
    medium = by_text["\U0001f469\U0001f3fd"]
    assert medium["woman firefighter, medium skin tone"] == "name"
    assert medium["a woman firefighter with medium skin tone"] == "article"
    assert medium["female firefighter with medium skin tone"] == "gender"
    assert medium["medium skin tone woman firefighter"] == "front"
    alone = [text for text, form in by_text["\U0001f60e"].items() if form == "keywords alone"]
    assert [sorted(text.split(", ")) for text in alone] == [["bright", "cool", "weather"]]
    # Three keywords of the firefighter are there, but her job and her work are every other person's too.
    assert "keywords alone" not in by_text["\U0001f469"].values()


def test_what_is_held_out_has_parts_that_are_seen() -> None:
    found = hold_out(emoji(), 0.3, seed=0)
    total, held = sum(len(one.captions) for one in found), sum(len(one.held_out) for one in found)
    assert held > 0 and abs(held - 0.3 * total) <= max(len(one.captions) for one in found)
    seen = {word for one in found for caption in one.captions if caption.text not in one.held_out
            for word in caption.text.replace(",", "").split()}  # fmt: skip
    hidden = {word for one in found for text in one.held_out for word in text.replace(",", "").split()}
    assert hidden <= seen
    kinds = {kind for one in found for kind in one.held_out.values()}
    assert kinds == {"parts", "order"}
    for one in found:
        if "order" in one.held_out.values():
            assert len(one.held_out) < len(one.captions), "the image is seen under other captions"
        elif one.held_out:
            assert len(one.held_out) == len(one.captions), "no caption of the image is seen"
    other = hold_out(emoji(), 0.3, seed=1)
    assert [one.held_out for one in other] != [one.held_out for one in found]


def test_a_bitmap_is_laid_over_white_and_averaged_in_linear_light() -> None:
    stream = io.BytesIO()
    bitmap(3).save(stream, "PNG")
    image = np.asarray(render(stream.getvalue(), 64), dtype=int)
    assert image.shape == (64, 64, 3)
    assert tuple(image[5, 40]) == (170, 60, 90), "opaque: the colour itself"
    over = [round(255 + (part - 255) * 128 / 255) for part in (170, 60, 90)]
    assert np.abs(image[5, 20] - over).max() <= 1, "half transparent: over white in sRGB values, to rounding"
    lines = Image.new("RGBA", (128, 128), "white")
    for row in range(0, 128, 2):
        lines.paste("black", (0, row, 128, row + 1))
    stream = io.BytesIO()
    lines.save(stream, "PNG")
    # Black and white lines have half of the light: 1.055 * 0.5 ** (1 / 2.4) - 0.055 = 0.7354 of 255.
    assert set(np.unique(np.asarray(render(stream.getvalue(), 64)))) == {188}
