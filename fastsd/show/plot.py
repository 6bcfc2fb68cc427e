"""Line plots with titles, axes and units, drawn with Pillow."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from fastsd.image.drawing import LIGHT, NORMAL, SMALL, Colour, Theme, text_width

FINE = 2  # lines are drawn at so many times the size, and averaged


@dataclass(frozen=True)
class Line:
    """A line through points; `dots` marks each, and `joined=False` leaves only those."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    dots: bool = False
    joined: bool = True


@dataclass(frozen=True)
class Axis:
    """An axis: its label with the unit, its range (None: of the data), logarithmic or not, and marks of its own."""

    label: str
    low: float | None = None
    high: float | None = None
    log: bool = False
    marks: Sequence[float] = ()


def nice_marks(low: float, high: float, most: int = 6) -> list[float]:
    """At most `most` round numbers between `low` and `high`."""
    if high <= low:
        return [low]
    raw = (high - low) / max(most - 1, 1)
    step = 10 ** math.floor(math.log10(raw))
    step = next(step * factor for factor in (1, 2, 5, 10, 20) if (high - low) / (step * factor) <= most - 1)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def log_marks(low: float, high: float) -> list[float]:
    """Powers of ten between two positive numbers, every second or third one where there are many."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    stride = max(1, (last - first) // 6 + 1 if last - first > 6 else 1)
    return [10.0**power for power in range(first, last + 1, stride)]


def spelled(value: float) -> str:
    """A mark's number: short, without "1e+03"."""
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
        mantissa, power = f"{value:.0e}".split("e")
        return f"{mantissa}e{int(power)}"
    return format(value, "g")


def plot(
    lines: Sequence[Line], x: Axis, y: Axis, title: str, size: tuple[int, int] = (560, 320), theme: Theme = LIGHT
) -> Image.Image:
    """A plot of `size` pixels; points that are not finite, or not positive on a logarithmic axis, are left out."""
    width, height = size
    x_range, y_range = (
        _range(x, [v for line in lines for v in line.x]),
        _range(y, [v for line in lines for v in line.y]),
    )
    x_marks, y_marks = _marks(x, x_range), _marks(y, y_range)
    left = 22 + NORMAL + max(text_width(spelled(mark), SMALL) for mark in y_marks)
    box = left, 34, width - 16, height - 46  # left, top, right, bottom
    place_x, place_y = _place(x, x_range, box[0], box[2]), _place(y, y_range, box[3], box[1])
    fine = Image.new("RGB", (width * FINE, height * FINE), theme.back)
    pen = ImageDraw.Draw(fine)
    for mark in x_marks:
        pen.line(_fine([(place_x(mark), box[1]), (place_x(mark), box[3])]), fill=theme.faint, width=1)
    for mark in y_marks:
        pen.line(_fine([(box[0], place_y(mark)), (box[2], place_y(mark))]), fill=theme.faint, width=1)
    for number, line in enumerate(lines):
        colour = theme.lines[number % len(theme.lines)]
        points = _fine([
            (place_x(a), place_y(b)) for a, b in zip(line.x, line.y) if _shown(x, a) and _shown(y, b)
        ])  # fmt: skip
        if line.joined and len(points) > 1:
            pen.line(points, fill=colour, width=2 * FINE, joint="curve")
        for cx, cy in points if line.dots else []:
            pen.ellipse([cx - 7, cy - 7, cx + 7, cy + 7], fill=colour, outline=theme.back, width=2)
    pen.rectangle([*_fine([(box[0], box[1])])[0], *_fine([(box[2], box[3])])[0]], outline=theme.ink, width=FINE)
    canvas = fine.resize((width, height), Image.Resampling.BOX)
    _write_axes(canvas, box, (x, y), ([(place_x(m), spelled(m)) for m in x_marks],
                                      [(place_y(m), spelled(m)) for m in y_marks]), title, theme)  # fmt: skip
    _write_legend(canvas, box, [line.label for line in lines], theme)
    return canvas


def _fine(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(px * FINE, py * FINE) for px, py in points]


def _shown(axis: Axis, value: float) -> bool:
    return math.isfinite(value) and (value > 0 or not axis.log)


def _range(axis: Axis, values: Sequence[float]) -> tuple[float, float]:
    shown = [value for value in values if _shown(axis, value)] or [1.0]
    low = min(shown) if axis.low is None else axis.low
    high = max(shown) if axis.high is None else axis.high
    if low == high:
        return (low / 2, high * 2) if axis.log else (low - 0.5, high + 0.5)
    return low, high


def _marks(axis: Axis, span: tuple[float, float]) -> list[float]:
    return list(axis.marks) or (log_marks(*span) if axis.log else nice_marks(*span)) or [span[0]]


def _place(axis: Axis, span: tuple[float, float], start: float, end: float) -> Callable[[float], float]:
    """Where a value stands between two pixels, within them."""

    def scale(value: float) -> float:
        return math.log10(value) if axis.log else value

    low, high = scale(span[0]), scale(span[1])
    return lambda value: start + min(max((scale(value) - low) / (high - low), 0.0), 1.0) * (end - start)


def _write_axes(
    canvas: Image.Image,
    box: tuple[int, int, int, int],
    axes: tuple[Axis, Axis],
    marks: tuple[list[tuple[float, str]], list[tuple[float, str]]],
    title: str,
    theme: Theme,
) -> None:
    """Title, numbers at the marks, labels; that of y is turned."""
    left, top, right, bottom = box
    pen = ImageDraw.Draw(canvas)
    pen.text((left, 10), title, fill=theme.ink, font_size=NORMAL + 1)
    for at, text in marks[0]:
        pen.text((at, bottom + 5), text, fill=theme.ink, font_size=SMALL, anchor="ma")
    for at, text in marks[1]:
        pen.text((left - 6, at), text, fill=theme.ink, font_size=SMALL, anchor="rm")
    pen.text(((left + right) / 2, bottom + 22), axes[0].label, fill=theme.ink, font_size=NORMAL, anchor="ma")
    turned = Image.new("RGB", (text_width(axes[1].label), NORMAL + 5), theme.back)
    ImageDraw.Draw(turned).text((0, 0), axes[1].label, fill=theme.ink, font_size=NORMAL)
    turned = turned.rotate(90, expand=True)
    canvas.paste(turned, (3, max(0, (top + bottom - turned.height) // 2)))


def _write_legend(canvas: Image.Image, box: tuple[int, int, int, int], labels: Sequence[str], theme: Theme) -> None:
    """Labels with their colour in the corner that the lines leave emptiest; none for a single unnamed line."""
    named = [(label, theme.lines[k % len(theme.lines)]) for k, label in enumerate(labels) if label]
    if not named:
        return
    width, height = max(text_width(label, SMALL) for label, _ in named) + 34, 18 * len(named) + 8
    corners = [(left, top) for top in (box[1] + 8, box[3] - height - 8) for left in (box[2] - width - 8, box[0] + 8)]
    left, top = min(corners, key=lambda at: _filled(canvas, (*at, at[0] + width, at[1] + height), theme.lines))
    pen = ImageDraw.Draw(canvas)
    pen.rectangle([left, top, left + width, top + height], fill=theme.back, outline=theme.faint)
    for number, (label, colour) in enumerate(named):
        y = top + 13 + 18 * number
        pen.line([(left + 6, y), (left + 24, y)], fill=colour, width=3)
        pen.text((left + 29, y), label, fill=theme.ink, font_size=SMALL, anchor="lm")


def _filled(canvas: Image.Image, box: tuple[int, int, int, int], colours: Sequence[Colour]) -> int:
    """How many pixels of a box have one of the colours."""
    counts = canvas.crop(box).getcolors(2**24) or []
    return sum(count for count, colour in counts if colour in colours)


@dataclass(frozen=True)
class Strip:
    """A row of dots: its label, where they are, which are hollow, a note at its end."""

    label: str
    x: Sequence[float]
    hollow: Sequence[bool] = ()
    note: str = ""


def strips(rows: Sequence[Strip], x: Axis, title: str, width: int, theme: Theme = LIGHT) -> Image.Image:
    """Rows of dots over one axis, a label before and a note after each."""
    span = _range(x, [value for row in rows for value in row.x])
    marks, step = _marks(x, span), 19
    left = 20 + max(text_width(row.label, SMALL) for row in rows)
    right = width - 20 - max(text_width(row.note, SMALL) for row in rows)
    top, bottom = 40, 46 + step * len(rows)
    place = _place(x, span, left + 8, right - 8)
    fine = Image.new("RGB", (width * FINE, (bottom + 48) * FINE), theme.back)
    pen = ImageDraw.Draw(fine)
    for mark in marks:
        pen.line(_fine([(place(mark), top - 4), (place(mark), bottom)]), fill=theme.faint, width=1)
    for number, row in enumerate(rows):
        colour, y = theme.lines[number % 2], top + 8 + step * number
        pen.line(_fine([(left, y), (right, y)]), fill=theme.faint, width=1)
        for at, hollow in zip(row.x, row.hollow or [False] * len(row.x)):
            if _shown(x, at):
                cx, cy = _fine([(place(at), y)])[0]
                pen.ellipse(
                    [cx - 8, cy - 8, cx + 8, cy + 8], fill=theme.back if hollow else colour, outline=colour, width=3
                )
    canvas = fine.resize((width, bottom + 48), Image.Resampling.BOX)
    pen = ImageDraw.Draw(canvas)
    pen.text((10, 10), title, fill=theme.ink, font_size=NORMAL + 1)
    for number, row in enumerate(rows):
        y = top + 8 + step * number
        pen.text((left - 8, y), row.label, fill=theme.ink, font_size=SMALL, anchor="rm")
        pen.text((right + 10, y), row.note, fill=theme.ink, font_size=SMALL, anchor="lm")
    for mark in marks:
        pen.text((place(mark), bottom + 4), spelled(mark), fill=theme.ink, font_size=SMALL, anchor="ma")
    pen.text(((left + right) / 2, bottom + 22), x.label, fill=theme.ink, font_size=NORMAL, anchor="ma")
    return canvas
