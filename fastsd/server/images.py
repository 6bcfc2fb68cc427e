"""Images in requests and answers: base64 in, files with their settings out."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import io
import re
import warnings
from collections.abc import Callable, Sequence
from typing import TypeVar

from PIL import Image

from fastsd.errors import FastsdError
from fastsd.image.files import READABLE, encode, open_image, open_layers, open_mask

FEW_PIXELS = 2**14  # whose file is made in half a millisecond
T = TypeVar("T")
_DATA = re.compile(r"data:[\w/+.;=-]*,", re.A)


def decode_base64(text: str, argument: str) -> bytes:
    """The bytes of raw base64 or of a data URI.

    Raises:
        FastsdError: it is neither; a URL, for example, which is not fetched.
    """
    if text[:8].lower().startswith(("http://", "https://", "file:", "ftp:")):
        raise FastsdError("a URL, which is not fetched; send the image itself, as base64", argument=argument)
    found = _DATA.match(text[:200])
    try:
        data = base64.b64decode("".join(text[found.end() if found else 0 :].split()), validate=True)
    except (binascii.Error, ValueError):
        raise FastsdError("not base64; send the image itself, as base64 or a data: URL", argument=argument) from None
    if not data:
        raise FastsdError("the image is empty", argument=argument)
    return data


def read_image(data: bytes, argument: str, pixels: int, mask: bool = False) -> tuple[Image.Image, dict[str, str]]:
    """An image that a client sent, and what files say of it: its hash.

    Args:
        pixels: it has no more than these, or is refused by its header.
        mask: one channel, white is changed; otherwise RGB.

    Raises:
        FastsdError: too large, damaged or no image.
    """
    check_pixels(data, argument, pixels)
    reader: Callable[[bytes, str], Image.Image] = open_mask if mask else open_image
    return reader(data, argument), {"name": argument, "sha256": hashlib.sha256(data).hexdigest()}


def read_painted(data: bytes, argument: str) -> Image.Image | None:
    """What is opaque in a mask with transparency, whatever its colour; None: it has none (`create_binary_mask` in
    A1111's modules/processing.py)."""
    layers, _ = open_layers(data, argument)
    return layers.getchannel("A").point(lambda alpha: 255 * (alpha > 128)) if layers.mode == "RGBA" else None


def check_pixels(data: bytes, argument: str, pixels: int) -> None:
    """Refuse an image by its header, before it is decoded; what is no image is refused by its reader."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=READABLE) as opened:
                width, height = opened.size
    except Exception:  # readers meet junk with exceptions of every kind; decoding says what is wrong
        return
    if width * height > pixels:
        message = f"{width}x{height} pixels; at most {pixels / 10**6:.0f} million are read"
        raise FastsdError(message, argument=argument)


async def encode_all(images: Sequence[Image.Image], texts: Sequence[dict[str, str]], suffix: str = ".png") -> list[str]:
    """An image file of each image with its texts in it, as base64."""

    def encoded() -> list[str]:
        return [_base64(image, suffix, own) for image, own in zip(images, texts, strict=True)]

    return await _apart(sum(image.width * image.height for image in images), encoded)


async def encode_plain(image: Image.Image, suffix: str = ".png") -> str:
    """An image file without settings, a preview's for example, as base64."""
    return await _apart(image.width * image.height, lambda: _base64(image, suffix, {}))


async def _apart(pixels: int, work: Callable[[], T]) -> T:
    """Work at so many pixels in a thread, unless it takes less time than a thread takes to begin it."""
    return work() if pixels <= FEW_PIXELS else await asyncio.to_thread(work)


def _base64(image: Image.Image, suffix: str, texts: dict[str, str]) -> str:
    return base64.b64encode(encode(image, suffix, texts)).decode()
