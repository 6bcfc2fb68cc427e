"""The bitmaps of a colour font, the sequences of characters that they stand for, and their images on white.

A font of Google's CBDT format holds a PNG for each glyph (OpenType, tables CBDT and CBLC). Which text a glyph stands
for is in `cmap` for one character, and in the ligatures of `GSUB` for a sequence.
"""

from __future__ import annotations

import io
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastsd.errors import FastsdError
from fastsd.files import reason

MAX_BITMAP = 1024  # pixels of a side; Noto's bitmaps are 136 x 128
VARIATION = 0xFE0F  # asks for the colour form of a character; CLDR's names leave it out


@dataclass(frozen=True)
class Bitmap:
    """One glyph: `texts`, the sequences that show it without variation selectors, sorted; `png`, its file."""

    texts: tuple[str, ...]
    png: bytes


def read_bitmaps(font: Path) -> list[Bitmap]:
    """Every bitmap of the largest strike of `font`, in the order of its glyphs.

    Raises:
        FastsdError: no such file, no font, a font without CBDT bitmaps; fontTools is not installed.
    """
    try:
        from fontTools.ttLib import TTFont, TTLibError
    except ImportError as error:
        raise FastsdError("needs fontTools: pip install 'fastsd[data]'", argument="--font") from error
    try:
        with font.open("rb") as file, TTFont(file, lazy=True) as opened:  # TTFont leaves what is no font open
            if "CBDT" not in opened:
                raise FastsdError(
                    "has no CBDT bitmaps; Debian's fonts-noto-color-emoji has", argument="--font", path=font
                )
            texts = _texts(opened)
            strike = max(opened["CBDT"].strikeData, key=len)
            return [Bitmap(tuple(sorted(texts[name])), bytes(bitmap.imageData)) for name, bitmap in strike.items()]
    except OSError as error:
        raise FastsdError(reason(error), argument="--font", path=font) from error
    except (TTLibError, AssertionError, KeyError, ValueError, AttributeError) as error:
        if isinstance(error, FastsdError):
            raise
        raise FastsdError(f"is no font that can be read ({error})", argument="--font", path=font) from error


def _texts(font: Any) -> dict[str, set[str]]:
    """The texts of each glyph's name, without variation selectors. Components of a ligature are characters."""
    characters: dict[str, str] = {}
    texts: dict[str, set[str]] = defaultdict(set)
    for code, name in sorted(font.getBestCmap().items()):
        characters.setdefault(name, chr(code))
        texts[name].add(chr(code))
    if "GSUB" in font:
        for lookup in font["GSUB"].table.LookupList.Lookup:
            for table in lookup.SubTable:
                table = getattr(table, "ExtSubTable", table)
                for first, ligatures in getattr(table, "ligatures", {}).items():
                    for ligature in ligatures:
                        parts = [first, *ligature.Component]
                        if all(part in characters for part in parts):
                            texts[ligature.LigGlyph].add("".join(characters[part] for part in parts))
    return defaultdict(set, {name: {text.replace(chr(VARIATION), "") for text in all_} for name, all_ in texts.items()})


def render(png: bytes, side: int) -> Image.Image:
    """A bitmap on white, `side` x `side` pixels, 8-bit sRGB.

    It is laid over white by its alpha in sRGB values, as browsers do, and trimmed of its empty columns to a square
    where it has such. It is made smaller in linear light (IEC 61966-2-1), in which the mean of pixels is the mean of
    their light: by box averages where `side` divides the bitmap's, else by Lanczos.

    Raises:
        FastsdError: the bitmap is damaged or larger than `MAX_BITMAP`.
    """
    try:
        with Image.open(io.BytesIO(png), formats=("PNG",)) as opened:
            if max(opened.size) > MAX_BITMAP:
                raise FastsdError(f"a bitmap has {opened.size} pixels; at most {MAX_BITMAP} a side", argument="--font")
            bitmap = opened.convert("RGBA")
    except OSError as error:
        raise FastsdError("a bitmap is damaged", argument="--font") from error
    bitmap = _square(bitmap)
    over = Image.new("RGBA", bitmap.size, (255, 255, 255, 255))
    over.alpha_composite(bitmap)
    light = _to_linear(np.asarray(over.convert("RGB"), dtype=np.float32) / 255)
    how = Image.Resampling.BOX if bitmap.width % side == 0 else Image.Resampling.LANCZOS
    small = np.stack(
        [np.asarray(Image.fromarray(channel).resize((side, side), how)) for channel in np.moveaxis(light, -1, 0)], -1
    )
    return Image.fromarray((_to_srgb(small.clip(0, 1)) * 255).round().astype(np.uint8), "RGB")


def _square(bitmap: Image.Image) -> Image.Image:
    """Cut empty columns or rows off both ends until it is square; a full one is centred in a square instead."""
    width, height = bitmap.size
    short, box = min(width, height), bitmap.getchannel("A").getbbox()
    left, top = (width - short) // 2, (height - short) // 2
    if box is None or (box[0] >= left and box[1] >= top and box[2] <= left + short and box[3] <= top + short):
        return bitmap.crop((left, top, left + short, top + short))
    long = max(width, height)
    canvas = Image.new("RGBA", (long, long))
    canvas.paste(bitmap, ((long - width) // 2, (long - height) // 2))
    return canvas


def _to_linear(values: np.ndarray) -> np.ndarray:
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4).astype(np.float32)


def _to_srgb(values: np.ndarray) -> np.ndarray:
    return np.where(values <= 0.0031308, values * 12.92, 1.055 * np.maximum(values, 0) ** (1 / 2.4) - 0.055)
