"""A colour font of a few bitmaps, and CLDR's two packages for it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image

TONES = {"\U0001f3fb": "light skin tone", "\U0001f3fd": "medium skin tone", "\U0001f3ff": "dark skin tone"}
PEOPLE = {"\U0001f469": "woman firefighter", "\U0001f468": "man singer", "\U0001f9d1": "person biking"}
THINGS = {
    "\u2764": ("red heart", ["love", "emotion"]),
    "\U0001f408": ("black cat", ["animal", "pet", "luck"]),
    "\U0001f60e": ("smiling face with sunglasses", ["cool", "bright", "weather"]),
}


def symbols() -> dict[str, tuple[str, list[str]]]:
    """Text, then CLDR's name and keywords: three things, and three people in four tones."""
    found = dict(THINGS)
    for person, name in PEOPLE.items():
        found[person] = (name, ["job", "work", name.split()[1]])
        for tone, word in TONES.items():
            found[person + tone] = (f"{name}: {word}", ["job", "work", name.split()[1], word])
    return found


def bitmap(index: int) -> Image.Image:
    """136 x 128 like Noto's: a block of one colour over the middle 128 columns, with a half transparent left half."""
    image = Image.new("RGBA", (136, 128))
    colour = (200 - 10 * index, 20 * (index % 12), 90)
    image.paste((*colour, 128), (4, 0, 68, 128))
    image.paste((*colour, 255), (68, 0, 132, 128))
    return image


def write_font(path: Path) -> Path:
    """A font with a bitmap for each symbol; those of two characters are ligatures."""
    pytest.importorskip("fontTools", reason="fontTools is not installed (the extra `data`)")
    from fontTools.feaLib.builder import addOpenTypeFeaturesFromString
    from fontTools.fontBuilder import FontBuilder
    from fontTools.ttLib import newTable
    from fontTools.ttLib.tables.BitmapGlyphMetrics import SmallGlyphMetrics
    from fontTools.ttLib.tables.C_B_D_T_ import cbdt_bitmap_format_17
    from fontTools.ttLib.tables.E_B_L_C_ import BitmapSizeTable, SbitLineMetrics, Strike, eblc_index_sub_table_1

    texts = list(symbols())
    glyphs = {text: "_".join(f"u{ord(c):X}" for c in text) for text in texts}
    order = [".notdef", *glyphs.values(), *(f"u{ord(tone):X}" for tone in TONES)]
    builder = FontBuilder(1024, isTTF=True)
    builder.setupGlyphOrder(order)
    builder.setupCharacterMap({ord(c): f"u{ord(c):X}" for c in dict.fromkeys("".join(texts))})
    builder.setupMaxp()
    builder.setupHorizontalMetrics(dict.fromkeys(order, (1024, 0)))
    builder.setupHorizontalHeader()
    builder.setupPost()
    lines = [f"sub {' '.join(f'u{ord(c):X}' for c in text)} by {glyphs[text]};" for text in texts if len(text) > 1]
    addOpenTypeFeaturesFromString(builder.font, "feature ccmp {\n" + "\n".join(lines) + "\n} ccmp;")

    pixels = {}
    for index, text in enumerate(texts):
        stream = io.BytesIO()
        bitmap(index).save(stream, "PNG")
        one = cbdt_bitmap_format_17(b"", builder.font)
        one.metrics, one.imageData = SmallGlyphMetrics(), stream.getvalue()
        one.metrics.height, one.metrics.width = 128, 136
        one.metrics.BearingX = one.metrics.BearingY = one.metrics.Advance = 0
        pixels[glyphs[text]] = one
    strike, size = Strike(), BitmapSizeTable()
    for name in ("hori", "vert"):
        line = SbitLineMetrics()
        for field in ("ascender", "descender", "widthMax", "caretSlopeNumerator", "caretSlopeDenominator"):
            setattr(line, field, 0)
        for field in ("caretOffset", "minOriginSB", "minAdvanceSB", "maxBeforeBL", "minAfterBL", "pad1", "pad2"):
            setattr(line, field, 0)
        setattr(size, name, line)
    size.colorRef, size.ppemX, size.ppemY, size.bitDepth, size.flags = 0, 109, 109, 32, 1
    index_table = eblc_index_sub_table_1(b"", builder.font)
    index_table.names = sorted(pixels, key=order.index)
    index_table.indexFormat, index_table.imageFormat = 1, 17
    strike.bitmapSizeTable, strike.indexSubTables = size, [index_table]
    builder.font["CBLC"], builder.font["CBDT"] = newTable("CBLC"), newTable("CBDT")
    builder.font["CBLC"].version = builder.font["CBDT"].version = 3.0
    builder.font["CBLC"].strikes, builder.font["CBDT"].strikeData = [strike], [pixels]
    builder.font.save(path)
    return path


def write_cldr(folder: Path) -> Path:
    """The packages' English annotations, in the layout of node_modules."""
    for package, kind, wanted in (
        ("cldr-annotations-full", "annotations", 1),
        ("cldr-annotations-derived-full", "annotationsDerived", 2),
    ):
        entries = {
            text: {"default": words, "tts": [name]} for text, (name, words) in symbols().items() if len(text) == wanted
        }
        file = folder / package / kind / "en" / "annotations.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps({kind: {"annotations": entries}}), encoding="utf-8")
        (folder / package / "LICENSE").write_text("UNICODE LICENSE V3\n", encoding="utf-8")
    return folder
