"""Text and labelled images on a canvas, with Pillow's own font: no other package is needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Theme:
    """Colours of a drawing. The background is opaque, so that a page of any colour may show it."""

    back: Colour
    ink: Colour
    faint: Colour  # grid lines, notes
    lines: tuple[Colour, ...]  # of plots, told apart by lightness too


LIGHT = Theme(
    (252, 252, 252),
    (32, 33, 36),
    (190, 193, 198),
    ((31, 98, 190), (205, 92, 8), (12, 128, 96), (150, 60, 150), (120, 120, 124)),
)
DARK = Theme(
    (24, 26, 30),
    (232, 234, 237),
    (92, 96, 102),
    ((122, 176, 255), (255, 168, 92), (92, 214, 170), (222, 150, 226), (160, 164, 170)),
)
THEMES = {"light": LIGHT, "dark": DARK}
SMALL, NORMAL, TITLE = 12, 14, 18  # pixels of the font


def text_width(text: str, size: int = NORMAL) -> int:
    """Pixels that a line of text takes."""
    return int(_RULER.textlength(text, font_size=size)) + 1


_RULER = ImageDraw.Draw(Image.new("L", (1, 1)))


def wrap(text: str, width: int, most: int, size: int = SMALL) -> list[str]:
    """`text` in at most `most` lines of `width` pixels; what does not fit ends in dots."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if text_width(longer, size) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    cut = lines[:most]
    if len(lines) > most or text_width(cut[-1], size) > width:
        while cut[-1] and text_width(cut[-1] + "...", size) > width:
            cut[-1] = cut[-1][:-1]
        cut[-1] += "..."
    return cut


def enlarged(image: Image.Image, width: int) -> Image.Image:
    """`image` at least `width` pixels wide: a small one by a whole factor, so that its pixels stay sharp."""
    factor = max(1, -(-width // image.width))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def shrunk(image: Image.Image, most: int) -> Image.Image:
    """`image` with no side longer than `most` pixels."""
    ratio = most / max(image.size)
    if ratio >= 1:
        return image
    size = max(1, round(image.width * ratio)), max(1, round(image.height * ratio))
    return image.resize(size, Image.Resampling.LANCZOS)


def labelled(
    rows: Sequence[Sequence[tuple[Image.Image, str]]], theme: Theme = LIGHT, lines: int = 2, gap: int = 8
) -> Image.Image:
    """Rows of images, each with its label below in at most `lines` lines."""
    width = max(image.width for row in rows for image, _ in row)
    steps = [max(image.height for image, _ in row) + (SMALL + 3) * lines + gap for row in rows]
    columns = max(map(len, rows))
    canvas = Image.new("RGB", (columns * (width + gap) + gap, sum(steps) + gap), theme.back)
    pen = ImageDraw.Draw(canvas)
    for y, row in enumerate(rows):
        for x, (image, label) in enumerate(row):
            left, top = gap + x * (width + gap), gap + sum(steps[:y])
            canvas.paste(image, (left, top))
            for number, line in enumerate(wrap(label, width, lines)):
                at = left, top + image.height + 3 + number * (SMALL + 3)
                pen.text(at, line, fill=theme.ink, font_size=SMALL)
    return canvas


def titled(image: Image.Image, title: str, notes: Sequence[str] = (), theme: Theme = LIGHT) -> Image.Image:
    """`image` under a title and a line for each note; it grows in width where they need it."""
    margin = 10
    width = max([image.width, text_width(title, TITLE) + 2 * margin, *(text_width(n) + 2 * margin for n in notes)])
    above = margin + TITLE + 6 + (NORMAL + 5) * len(notes) + 4
    canvas = Image.new("RGB", (width, above + image.height), theme.back)
    pen = ImageDraw.Draw(canvas)
    pen.text((margin, margin), title, fill=theme.ink, font_size=TITLE)
    for number, note in enumerate(notes):
        pen.text((margin, margin + TITLE + 6 + number * (NORMAL + 5)), note, fill=theme.ink, font_size=NORMAL)
    canvas.paste(image, (0, above))
    return canvas


def stacked(images: Sequence[Image.Image], theme: Theme = LIGHT) -> Image.Image:
    """Images below one another, at the left."""
    canvas = Image.new("RGB", (max(one.width for one in images), sum(one.height for one in images)), theme.back)
    top = 0
    for one in images:
        canvas.paste(one, (0, top))
        top += one.height
    return canvas
