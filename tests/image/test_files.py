"""Images from files that nobody vouches for, and images written whole or not at all."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from fastsd.errors import FastsdError
from fastsd.image import files as images
from fastsd.image.files import encode, load, open_image, open_mask, read_text


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it is this large, with hardly any data."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(b"0")) + b""


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gradient() -> Image.Image:
    y, x = np.mgrid[0:24, 0:16]
    return Image.fromarray(np.stack([10 * x, 10 * y, 5 * (x + y)], axis=-1).astype(np.uint8))


def line(caught: pytest.ExceptionInfo[FastsdError]) -> str:
    message = str(caught.value)
    assert "\n" not in message and len(message) < 300
    return message


# Reading


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP", "GIF"])
def test_formats_give_the_same_pixels(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    photo = gradient().quantize(256) if kind == "GIF" else gradient()
    read = open_image(saved(photo, kind, **options))
    assert read.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(read), np.asarray(photo.convert("RGB")))


def test_every_depth_of_grey_spans_black_to_white() -> None:
    ramp = np.linspace(0, 65535, 24 * 16).reshape(24, 16).astype(np.uint16)
    read = np.asarray(open_image(saved(Image.fromarray(ramp))))
    np.testing.assert_array_equal(read[..., 0], (ramp / 257.0).round().astype(np.uint8))
    one_bit = np.asarray(open_image(saved(Image.fromarray(ramp > 30000))))
    assert set(np.unique(one_bit)) == {0, 255}
    assert open_image(saved(Image.new("CMYK", (4, 4), (0, 0, 0, 0)), "TIFF")).getpixel((0, 0)) == (255, 255, 255)


def test_transparency_is_white_in_an_image_and_kept_in_a_mask() -> None:
    clear = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    clear.putpixel((0, 0), (255, 255, 255, 255))
    half = Image.new("LA", (4, 4), (0, 128))
    palette = clear.quantize(8)
    assert open_image(saved(clear)).getpixel((1, 1)) == (255, 255, 255)
    assert open_mask(saved(clear)).getpixel((1, 1)) == 0 and open_mask(saved(clear)).getpixel((0, 0)) == 255
    assert open_image(saved(half)).getpixel((0, 0)) == (127, 127, 127)
    assert open_image(saved(palette)).getpixel((1, 1)) == (255, 255, 255)


def test_the_cameras_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    data = saved(gradient(), "PNG", exif=exif)
    read = open_image(data)
    assert read.size == (24, 16)
    np.testing.assert_array_equal(np.asarray(read), np.rot90(np.asarray(gradient()), 3))
    assert open_mask(data).size == (24, 16)


def test_a_broken_exif_block_does_not_hide_the_image() -> None:
    data = saved(gradient(), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    assert open_image(data).size == (16, 24)


def test_the_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "PNG"):
        assert open_image(saved(frames[0], kind, save_all=True, append_images=frames[1:])).getpixel((0, 0)) == (
            255,
            0,
            0,
        )


def test_what_is_no_image(tmp_path: Path) -> None:
    cases = {
        "text.png": (b"not an image at all", "not an image"),
        "empty.png": (b"", "empty"),
        "cut.png": (saved(Image.effect_noise((64, 64), 90))[:-600], "damaged or cut short"),
        "cut.jpg": (saved(gradient().resize((200, 200)), "JPEG")[:900], "damaged or cut short"),
        "bomb.png": (png_header(60_000, 60_000), "million"),
        "wide.png": (png_header(2**31 - 1, 1), "million"),
        "program.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        "script.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        "float.tiff": (saved(Image.new("F", (4, 4), 0.5), "TIFF"), "8 or 16 bits"),
        "deep.tiff": (saved(Image.new("I", (4, 4), 2**30), "TIFF"), "8 or 16 bits"),
    }
    for name, (data, said) in cases.items():
        (tmp_path / name).write_bytes(data)
        for read in (open_image, open_mask, read_text):
            with pytest.raises(FastsdError, match=said) as caught:
                read(tmp_path / name, "--image")
            assert "--image" in line(caught) and name in line(caught)


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    for path, said in ((tmp_path / "none.png", "no such file"), (tmp_path, "a folder"), (tmp_path / "pipe", "regular")):
        with pytest.raises(FastsdError, match=said) as caught:
            open_image(path, "--mask")
        assert "--mask" in line(caught)


def test_a_size_below_the_limit_is_no_bomb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 16 * 24)
    assert open_image(saved(gradient())).size == (16, 24)
    with pytest.raises(FastsdError, match="16x25 pixels"):
        open_image(saved(gradient().resize((16, 25))))
    monkeypatch.setattr(images, "MAX_BYTES", 10)
    with pytest.raises(FastsdError, match="at most"):
        open_image(Path(__file__))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF"])
def test_flipped_bytes_are_an_error_line_at_worst(kind: str) -> None:
    whole = saved(gradient(), kind)
    rng = np.random.default_rng(0)
    for _ in range(60):
        data = np.frombuffer(whole, dtype=np.uint8).copy()
        data[rng.integers(0, len(data), 4)] = rng.integers(0, 256, 4)
        try:
            assert open_image(data.tobytes()).mode == "RGB"
        except FastsdError as error:
            assert "\n" not in str(error)


# Writing


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_texts_come_back(suffix: str) -> None:
    texts = {"parameters": "a café, 猫\nNegative prompt: b\nSteps: 1", "fastsd": '{"prompt": "a \\u732b"}'}
    data = encode(gradient(), suffix, texts)
    assert read_text(data) == texts
    if suffix != ".jpg":
        np.testing.assert_array_equal(np.asarray(open_image(data)), np.asarray(gradient()))


def test_a_jpeg_without_room_for_the_text_keeps_its_pixels() -> None:
    data = encode(gradient(), ".jpg", {"parameters": "a" * 70_000})
    assert read_text(data) == {} and open_image(data).size == (16, 24)


LINES = "a café, 猫\nSteps: 1, Sampler: Euler, Seed: 5"


def with_exif(comment: bytes = b"", tags: dict[int, str] | None = None, kind: str = "JPEG") -> bytes:
    exif = Image.Exif()
    for tag, text in (tags or {}).items():
        exif[tag] = text
    exif[ExifTags.IFD.Exif] = {ExifTags.Base.UserComment: comment}
    return saved(gradient(), kind, exif=exif)


@pytest.mark.parametrize(
    "comment",
    [
        b"UNICODE\0" + LINES.encode("utf-16-be"),
        b"UNICODE\0" + LINES.encode("utf-16-le"),
        b"UNICODE\0" + LINES.encode("utf-16"),
        b"UNICODE\0" + LINES.encode(),
        b"ASCII\0\0\0" + LINES.encode(),
        bytes(8) + LINES.encode(),
    ],
)
@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG"])
def test_settings_in_exif_are_read_in_each_encoding(comment: bytes, kind: str) -> None:
    assert read_text(with_exif(comment, kind=kind)) == {"parameters": LINES}


@pytest.mark.parametrize("make, model, word", [(0x10F, 0x110, "Workflow"), (0x110, 0x10E, "workflow")])
def test_comfyuis_graph_in_the_exif_of_webp(make: int, model: int, word: str) -> None:
    graph, prompt = '{"nodes": []}', '{"3": {"class_type": "KSampler", "inputs": {}}}'
    tags = {make: f"{word}:{graph}", model: f"Prompt: {prompt}", 0x131: "prompt: none"}
    assert read_text(with_exif(tags=tags, kind="WEBP")) == {"workflow": graph, "prompt": prompt}


def test_an_image_that_a_caller_opened_is_read_whole_or_refused(tmp_path: Path) -> None:
    whole = saved(gradient().resize((160, 240)))
    (tmp_path / "whole.png").write_bytes(whole)
    load(Image.open(tmp_path / "whole.png"))
    cut = Image.open(io.BytesIO(whole[: len(whole) // 2]))
    with Image.open(tmp_path / "whole.png") as closed:
        pass
    for image in (cut, closed):
        with pytest.raises(FastsdError, match="damaged, cut short or was closed before it was read"):
            load(image)
