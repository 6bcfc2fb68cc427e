"""Images from and to file formats. Untrusted ones are read with limits."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from fastsd.errors import FastsdError, about
from fastsd.files import check_path, reason
from fastsd.image import modes

MAX_PIXELS = 2**27  # 134 million: 384 MiB as RGB
MAX_BYTES = 2**29
# Formats whose readers are plain decoders. Pillow's others stay shut: some start programs (EPS), few are ever needed.
READABLE = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
WRITABLE = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
LONGEST_SIDE = {"WEBP": 16383, "JPEG": 65535}  # pixels that the format has room for
WHITE, BLACK = 255, 0


def open_image(source: str | Path | bytes, argument: str | None = "image") -> Image.Image:
    """An image from a file or its bytes as RGB, 8 bits a channel.

    An animation gives its first frame. The camera's orientation (EXIF) is applied. Transparent pixels become white, as
    in A1111. 16 bits are scaled to 8. An embedded colour profile is converted to sRGB; where that fails, a note is in
    `info["notes"]`, which a call that takes the image repeats.

    Args:
        source: a path, or a file's bytes.
        argument: the parameter that it is for, which errors are about.

    Raises:
        FastsdError: no such file, too large, damaged or no image.
    """
    return _read(source, argument, "RGB", WHITE)[0]


def open_mask(source: str | Path | bytes, argument: str | None = "mask_image") -> Image.Image:
    """A mask as one channel, 8 bits: white is changed. Transparent pixels become black, that is, kept.

    Raises:
        FastsdError: as `open_image`.
    """
    return _read(source, argument, "L", BLACK)[0]


def open_depth(source: str | Path | bytes, argument: str | None = "depth_image") -> Image.Image:
    """A depth map as floating-point pixels, in the file's own range.

    Raises:
        FastsdError: as `open_image`.
    """
    return _read(source, argument, "F", BLACK)[0]


def as_depth(image: Image.Image) -> Image.Image:
    """`image` as floating-point pixels: those of 16 bits and more keep their values, colours become their luminance."""
    if image.mode != "F" and not image.mode.startswith("I"):
        image = flatten(image, "L", BLACK)
    return Image.fromarray(np.asarray(image).astype(np.float32))


def open_layers(source: str | Path | bytes, argument: str | None = "image") -> tuple[Image.Image, dict[str, str]]:
    """As `open_image`, with its transparency: RGB, or RGBA where a pixel is not opaque. And the texts in it.

    Raises:
        FastsdError: as `open_image`.
    """
    return _read(source, argument, "RGBA", WHITE)


def count_frames(path: str | Path, argument: str | None = None) -> int:
    """How many images a file holds: those of an animation, the pages of a TIFF. Raises as `image_size`."""
    with about(argument, Path(path)), _decoding(), Image.open(path, formats=READABLE) as opened:
        return int(getattr(opened, "n_frames", 1))


def image_size(path: str | Path, argument: str | None = None) -> tuple[int, int]:
    """Width and height of an image file, upright, by its header alone.

    Raises:
        FastsdError: as `open_image`, but for damage after the header.
    """
    path = Path(path)
    if not path.is_file():
        read_file(path, argument)  # which says why
    with about(argument, path), _decoding(), Image.open(path, formats=READABLE) as opened:
        _check_size(opened.size)
        width, height = opened.size
        turned = opened.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        return (height, width) if turned else (width, height)


def read_text(source: str | Path | bytes, argument: str | None = "image") -> dict[str, str]:
    """The texts stored in an image: a PNG's text chunks; those of `_exif_texts` from others.

    Raises:
        FastsdError: as `open_image`.
    """
    return _read(source, argument, "RGB", WHITE)[1]


def read_file(path: str | Path, argument: str | None = None) -> bytes:
    """All of a regular file, up to `MAX_BYTES`.

    Raises:
        FastsdError: it is missing, empty, too large or cannot be read.
    """
    with about(argument, path):
        check_path(path)
    path = Path(path)
    with about(argument, path):
        try:
            if path.is_dir():
                raise FastsdError("a folder, not an image")
            if path.exists() and not path.is_file():
                raise FastsdError("not a regular file")
            size = path.stat().st_size
            if size > MAX_BYTES:
                raise FastsdError(f"{size / 2**20:.0f} MiB; at most {MAX_BYTES // 2**20} MiB are read")
            data = path.read_bytes()
        except OSError as error:
            raise FastsdError(reason(error)) from error
        if not data:
            raise FastsdError("the file is empty")
    return data


def _read(
    source: str | Path | bytes, argument: str | None, mode: str, background: int
) -> tuple[Image.Image, dict[str, str]]:
    """The image in `mode`, flattened on `background` (a depth map, "F", is not), and the texts in it."""
    path = None if isinstance(source, bytes) else Path(source)
    data = source if isinstance(source, bytes) else read_file(source, argument)
    with about(argument, path), _decoding(), Image.open(io.BytesIO(data), formats=READABLE) as opened:
        _check_size(opened.size)
        opened.load()
        texts = _texts(opened)
        image = _upright(opened)
        return as_depth(image) if mode == "F" else flatten(image, mode, background), texts


@contextmanager
def _decoding() -> Iterator[None]:
    """Inside this context, whatever a decoder raises is an error of one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about odd files; what matters is checked here
            yield
    except FastsdError:
        raise
    except Image.DecompressionBombError:
        raise FastsdError(f"too many pixels; at most {MAX_PIXELS // 10**6} million are read") from None
    except Image.UnidentifiedImageError:
        kinds = ", ".join(READABLE[:-1]) + " or " + READABLE[-1]
        raise FastsdError(f"not an image that can be read; use {kinds}") from None
    except MemoryError:
        raise
    except Exception as error:  # decoders meet junk with exceptions of every kind
        cause = str(error) or type(error).__name__
        raise FastsdError(f"the image is damaged or cut short ({cause}); fetch or save it again") from error


def _check_size(size: tuple[int, int]) -> None:
    """Refuse a decompression bomb by its header, before anything is decoded."""
    width, height = size
    if width * height > MAX_PIXELS:
        raise FastsdError(f"{width}x{height} pixels; at most {MAX_PIXELS // 10**6} million are read")


def _upright(image: Image.Image) -> Image.Image:
    """`image` turned by its EXIF orientation. A broken EXIF block is no reason to refuse the pixels."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image


def load(image: Image.Image) -> None:
    """Read the pixels of an image that a caller opened, which Pillow puts off until they are needed.

    Raises:
        FastsdError: its file is damaged, cut short or closed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image.load()
    except MemoryError:
        raise
    except Exception as error:
        cause = str(error) or type(error).__name__
        raise FastsdError(f"its file is damaged, cut short or was closed before it was read ({cause})") from error


def flatten(image: Image.Image, mode: str, background: int) -> Image.Image:
    """`image` in `mode`, see `fastsd.image.modes.flatten`; notes on its profile are in its `info`."""
    return modes.flatten(image, mode, background)[0]


def _texts(image: Image.Image) -> dict[str, str]:
    """A PNG's text chunks, or the texts in the EXIF of another format."""
    texts = getattr(image, "text", None)
    if isinstance(texts, dict) and texts:
        return {str(key): str(value) for key, value in texts.items()}
    return _exif_texts(image)


def _exif_texts(image: Image.Image) -> dict[str, str]:
    """What `encode` and A1111 put into EXIF ("parameters", "fastsd"), and ComfyUI ("prompt", "workflow")."""
    try:
        exif = image.getexif()
        comment = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment, b"")
        tags = {tag: text for tag, text in exif.items() if isinstance(text, str)}
    except Exception:  # a broken EXIF block holds no texts
        return {}
    found = {}
    if isinstance(comment, bytes) and comment[:8] in (b"UNICODE\0", b"ASCII\0\0\0", bytes(8)) and comment[8:]:
        found["parameters"] = _comment(comment[8:])
    if tags.get(ExifTags.Base.ImageDescription, "").startswith("{"):
        found["fastsd"] = tags[ExifTags.Base.ImageDescription]
    for text in tags.values():
        named = re.match(r"(prompt|workflow):\s*(?=\{)", text, re.IGNORECASE)
        if named:  # ComfyUI's nodes for WebP and JPEG take any tags, of the camera's make for one
            found[named[1].lower()] = text[named.end() :]
    return found


def _comment(data: bytes) -> str:
    """An EXIF comment without its eight bytes of charset: UTF-16 in either order, or UTF-8.

    EXIF does not say which order. A1111 writes the high byte first; a program that rewrites the file, such as exiftool,
    may turn it. A line of settings has ASCII letters, whose high byte is 0.
    """
    high, low = data[::2].count(0), data[1::2].count(0)
    code = "utf-8" if b"\0" not in data else "utf-16-be" if high >= low else "utf-16-le"
    return data.decode(code, errors="replace").removeprefix("\ufeff")


def check_sides(size: tuple[int, int], suffix: str, argument: str) -> None:
    """Refuse a (width, height) that a format has no room for."""
    if max(size) > LONGEST_SIDE.get(WRITABLE[suffix.lower()], max(size)):
        raise FastsdError(f"{size[0]}x{size[1]} pixels are more than {suffix} holds; use .png", argument=argument)


def encode(image: Image.Image, suffix: str, texts: Mapping[str, str]) -> bytes:
    """An image file's bytes, with `texts` in it.

    PNG: text chunks. JPEG (quality 95) and WebP (lossless): "parameters" as the EXIF comment, where A1111 has it, and
    "fastsd" as the description.
    """
    buffer, kind = io.BytesIO(), WRITABLE[suffix.lower()]
    if kind == "PNG":
        chunks = PngInfo()
        for key, text in texts.items():
            chunks.add_text(key, text)
        image.save(buffer, kind, pnginfo=chunks)
        return buffer.getvalue()
    exif = Image.Exif()
    if "fastsd" in texts:
        exif[ExifTags.Base.ImageDescription] = texts["fastsd"]
    comment = b"UNICODE\0" + texts.get("parameters", "").encode("utf-16-be")
    exif[ExifTags.IFD.Exif] = {ExifTags.Base.UserComment: comment}
    data = exif.tobytes()
    if kind == "JPEG" and len(data) > 65000:  # one JPEG segment holds no more; the image is worth more than its text
        data = b""
    image.save(buffer, kind, exif=data, **({"quality": 95} if kind == "JPEG" else {"lossless": True}))
    return buffer.getvalue()
