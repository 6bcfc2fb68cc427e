"""Images of every Pillow mode as 8 bits a channel in sRGB, as Pillow shows them; embedded colour profiles."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from fastsd.errors import FastsdError

MAX_PROFILE = 2**24  # bytes of a colour profile; printers' have up to a few MiB
SPACES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab ": "LAB"}  # a profile's colour space as a mode
DEEP_FILES = ("PNG", "PPM")  # formats whose "I" is 16 bits


def flatten(image: Image.Image, mode: str, background: int) -> tuple[Image.Image, list[str]]:
    """`image` in `mode` ("RGB" or "L"), 8 bits a channel, sRGB, without transparency; and notes on its profile.

    "RGBA" keeps the transparency: the result is RGB where every pixel is opaque.

    Args:
        background: the colour of transparent pixels. A mask, "L", is its numbers: it keeps them, whatever its profile.

    Raises:
        FastsdError: its pixels are not 8 or 16 bits, nor floating-point numbers from 0 to 255.
    """
    alpha = _alpha(image)
    profile = image.info.get("icc_profile") if mode != "L" else None
    colours = _eight_bits(image)
    notes: list[str] = []
    if profile:
        colours, notes = _to_srgb(colours, profile)
    if colours.mode == "LAB":
        colours = _lab_to_rgb(colours)
    converted = colours.convert(mode.removesuffix("A"))
    if mode == "RGBA" and alpha is not None and alpha.getextrema() != (255, 255):
        converted.putalpha(alpha)
    elif mode != "RGBA" and alpha is not None:
        converted = Image.composite(converted, Image.new(mode, image.size, (background,) * len(mode)), alpha)
    converted = converted.copy() if converted is image else converted
    converted.info = {"notes": tuple(notes)} if notes else {}
    return converted, notes


def _alpha(image: Image.Image) -> Image.Image | None:
    """The transparency of an image as "L", 255 opaque; None without any."""
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        return image.getchannel(image.getbands()[-1])
    clear = image.info.get("transparency")
    if clear is None:
        return None
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(np.where(np.asarray(image) == clear, 0, 255).astype(np.uint8))
    return image.convert("RGBA").getchannel("A") if image.has_transparency_data else None


def _eight_bits(image: Image.Image) -> Image.Image:
    """The colours of an image as one of 1, L, RGB, CMYK or LAB."""
    mode = image.mode
    if mode.startswith("I"):
        return _from_whole(image)
    if mode == "F":
        values = np.asarray(image)
        if not np.isfinite(values).all():
            raise FastsdError("it holds pixels that are no numbers")
        if 0 < values.max() <= 1:
            raise FastsdError("its floating-point pixels are at most 1; save it with 8 or 16 bits, or multiply by 255")
        return image.convert("L")
    if mode == "La":
        return image.convert("LA").convert("L")
    if mode == "LA":
        return image.getchannel("L")
    if mode == "RGBa":
        return image.convert("RGBA").convert("RGB")
    if mode in ("1", "L", "RGB", "CMYK", "LAB"):
        plain = image.copy()
        plain.info = {}
        return plain
    if mode in ("P", "PA", "RGBA"):
        plain = image.convert("RGBA")
        return Image.merge("RGB", plain.split()[:3])
    return image.convert("RGB")  # HSV, YCbCr, RGBX


def _from_whole(image: Image.Image) -> Image.Image:
    """16 bits scaled to 8, which `convert` would cut at 255; 32 bits that hold no more than 8 as they are."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise FastsdError("32-bit pixels are not read; save it with 8 or 16 bits")
    if image.mode == "I" and values.max() <= 255 and getattr(image, "format", None) not in DEEP_FILES:
        return Image.fromarray(values.astype(np.uint8))
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _to_srgb(image: Image.Image, data: Any) -> tuple[Image.Image, list[str]]:
    """An image without transparency in sRGB by its profile; as it is, with a note, where that cannot be done.

    A profile under which no colour moves by more than 2 of 255 is sRGB: pixels keep their numbers.
    """
    if not isinstance(data, bytes) or len(data) > MAX_PROFILE:
        return image, [f"the colour profile is left out: more than {MAX_PROFILE // 2**20} MiB"]
    try:
        from PIL import ImageCms

        profile = ImageCms.getOpenProfile(io.BytesIO(data))
        space = SPACES.get(profile.profile.xcolor_space, "")
        if space == "RGB" and image.mode in ("1", "L"):
            image = image.convert("RGB")
        elif space == "L" and image.mode == "1":
            image = image.convert("L")
        if space != image.mode:
            return image, [f"the colour profile is left out: it is for {space or 'other colours'}, not {image.mode}"]
        transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), space, "RGB")
        if _is_identity(transform, space):
            return image, []
        return ImageCms.applyTransform(image, transform) or image, []  # None is of a transform in place
    except ImportError:
        return image, ["the colour profile is left out: this Pillow has no LittleCMS; colours may differ"]
    except Exception as error:  # the library meets junk with exceptions of several kinds
        return image, [f"the colour profile is damaged and left out ({str(error)[:80]}); colours may differ"]


def _is_identity(transform: Any, mode: str) -> bool:
    """Whether a transform leaves the colours of a lattice where they are."""
    from PIL import ImageCms

    if mode not in ("RGB", "L"):
        return False
    steps = np.arange(0, 256, 15, dtype=np.uint8)
    lattice = (
        np.stack(np.meshgrid(steps, steps, steps), -1).reshape(-1, len(steps), 3) if mode == "RGB" else steps[None]
    )
    probe = Image.fromarray(np.ascontiguousarray(lattice))
    found = np.asarray(ImageCms.applyTransform(probe, transform), dtype=int)
    return bool(np.abs(found - np.asarray(probe.convert("RGB"), dtype=int)).max() <= 2)


def _lab_to_rgb(image: Image.Image) -> Image.Image:
    """CIELAB (D50) to sRGB, for which Pillow's `convert` has no rule."""
    try:
        from PIL import ImageCms

        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.applyTransform(image, ImageCms.buildTransform(lab, srgb, "LAB", "RGB")) or image
    except ImportError:
        raise FastsdError("LAB is not read: this Pillow has no LittleCMS; save it as RGB") from None
