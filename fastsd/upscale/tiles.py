"""A network over an image in overlapping tiles, in the memory of one row of tiles and of the result.

A result sees as far as the network's radius. Tiles that share twice as much, and are cut in the middle, give what the
whole image would: that is done where it is cheap. Deep networks see hundreds of pixels far, though hardly anything of
what is that far; their tiles share less, and are cross-faded where they meet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

CHEAP = 40  # pixels; a network that sees no further gets the margin with which tiles are exact
MARGIN, FADE = 16, 8  # of others: what a tile reads beyond what it gives, and the pixels of a cross-fade

Run = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Seam:
    """How tiles meet.

    Attributes:
        margin: pixels that a tile reads beyond those that it gives.
        fade: pixels over which two tiles are cross-faded.
        step: tiles begin at multiples of this.
    """

    margin: int
    fade: int
    step: int = 1

    @classmethod
    def of(cls, radius: int, step: int = 1) -> Seam:
        """For a network that sees `radius` pixels far."""
        margin, fade = (radius, 0) if radius <= CHEAP else (MARGIN, FADE)
        return cls(-(-margin // step) * step, fade, step)

    @property
    def overlap(self) -> int:
        """Pixels that neighbours share."""
        shared = 2 * self.margin + self.fade
        return -(-shared // self.step) * self.step

    @property
    def smallest(self) -> int:
        """The smallest tile that gives as much as it shares."""
        return 2 * self.overlap + 2 * self.fade + 2 * self.step


@dataclass(frozen=True)
class TileSpan:
    """A tile along one side of the image: it reads `start` to `end`, and gives `first` to `last`, of which the first
    `rise` pixels are cross-faded with the tile before."""

    start: int
    end: int
    first: int
    last: int
    rise: int = 0


def spans(length: int, tile: int, seam: Seam) -> list[TileSpan]:
    """The tiles along a side. All are equally long, so that a layer's weight is packed once.

    Args:
        length: of the side, a multiple of `seam.step`.
        tile: at most this many pixels, a multiple of it too, and at least `seam.smallest`.
    """
    if length <= tile:
        return [TileSpan(0, length, 0, length)]
    starts = [*range(0, length - tile, tile - seam.overlap), length - tile]
    cuts = [0]  # where the cross-fade with the next tile begins
    cuts += [(after + before + tile - seam.fade) // 2 for before, after in zip(starts, starts[1:], strict=False)]
    ends = [*(cut + seam.fade for cut in cuts[1:]), length]
    return [
        TileSpan(start, start + tile, cut, end, seam.fade if i else 0)
        for i, (start, cut, end) in enumerate(zip(starts, cuts, ends, strict=True))
    ]


def count_tiles(height: int, width: int, tile: int, seam: Seam) -> int:
    """How many tiles an image takes."""
    return len(spans(height, tile, seam)) * len(spans(width, tile, seam))


def in_tiles(run: Run, image: np.ndarray, scale: int, tile: int, seam: Seam) -> Iterator[np.ndarray | None]:
    """`run` over an image, tile by tile.

    Args:
        run: a part of the image, `[h, w, C]` uint8, to `[scale h, scale w, C]` fp32 from 0 to 255.
        image: `[H, W, C]` uint8; its sides are multiples of `seam.step`.

    Yields:
        None after each tile but the last, then the result, `[scale H, scale W, C]` uint8.
    """
    height, width, channels = image.shape
    rows, columns = spans(height, tile, seam), spans(width, tile, seam)
    result = np.empty((scale * height, scale * width, channels), dtype=np.uint8)
    above = np.empty(0, dtype=np.float32)  # what the row of tiles before gave of the rows that are cross-faded
    for row in rows:
        strip = np.empty((scale * (row.last - row.first), scale * width, channels), dtype=np.float32)
        for column in columns:
            part = run(image[row.start : row.end, column.start : column.end])
            inside = slice(scale * (row.first - row.start), scale * (row.last - row.start))
            part = part[inside, scale * (column.first - column.start) : scale * (column.last - column.start)]
            _lay(strip, part, scale * column.first, scale * column.rise, axis=1)
            if (row, column) != (rows[-1], columns[-1]):
                yield None
        if row.rise:
            _lay(above, strip[: len(above)], 0, scale * row.rise, axis=0)
            strip[: len(above)] = above
        kept = len(strip) - (scale * seam.fade if row is not rows[-1] else 0)
        above = strip[kept:].copy()
        first = scale * row.first
        np.rint(strip[:kept], out=strip[:kept])
        result[first : first + kept] = strip[:kept]
    yield result


def _lay(target: np.ndarray, part: np.ndarray, at: int, rise: int, axis: int) -> None:
    """Write `part` into `target` at `at` along an axis; its first `rise` entries are mixed with what is there."""
    share = (np.arange(rise, dtype=np.float32) + 0.5) / max(rise, 1)
    share = share[:, None, None] if axis == 0 else share[None, :, None]
    old = target[at : at + rise] if axis == 0 else target[:, at : at + rise]
    new = part[:rise] if axis == 0 else part[:, :rise]
    old += (new - old) * share if rise else 0
    if axis == 0:
        target[at + rise : at + len(part)] = part[rise:]
    else:
        target[:, at + rise : at + part.shape[1]] = part[:, rise:]
