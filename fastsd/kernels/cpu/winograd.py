"""3 x 3 convolutions with fewer products: Winograd's algorithm F(2 x 2, 3 x 3) (Lavin and Gray 2015, section 4.1).

A tile of 2 x 2 results reads 4 x 4 pixels. In one dimension, results y of taps g over pixels d are

    y0 = m0 + m1 + m2    m0 = (d0 - d2) g0    m1 = (d1 + d2) (g0 + g1 + g2) / 2
    y1 = m1 - m2 - m3    m3 = (d1 - d3) g2    m2 = (d2 - d1) (g0 - g1 + g2) / 2

which is 4 products instead of 6; in both dimensions 16 instead of 36. Where the map is doubled by nearest neighbour
before the convolution, d1 = d2 = s1, the pixel of the small map: m2 is 0, and the tile takes 9 products of 36:

    y0 = m0 + m1    m0 = (s0 - s1) g0    m1 = s1 (g0 + g1 + g2)
    y1 = m1 - m3    m3 = (s1 - s2) g2

Between the sums of pixels and those of results stand 16 or 9 matrix products over the channels, one grouped 1 x 1
convolution of oneDNN's. It runs over strips of whole rows
of tiles that stay in the cache. The weights' sums are taken in each call: a changed weight takes effect at once, and
nothing is kept. docs/numerics.md has the memory that a call takes and the argument about rounding.

The sums of a tile mix its pixels: where a pixel is infinite or NaN, all four results of each tile that reads it are
NaN, at most two pixels from the pixel in each direction; a convolution's are so within one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fastsd.kernels.cpu import onednn

Lines = Sequence[torch.Tensor]
STRIP = 128  # tiles of a strip, for each thread
CHUNK = 2**20  # elements of the weights' sums that are taken and packed at a time
BLOCK = 16  # channels that every kernel of oneDNN's takes at a time; other counts meet slow ones
SCRATCH = 32  # rows of the weight that are summed at a time


def takes(weight: torch.Tensor, stride: int) -> bool:
    """Whether `convolve` computes convolutions by this weight (as an ordinary tensor): fp32, 3 x 3, whole blocks."""
    outputs, inputs, *kernel = weight.shape
    whole = outputs % BLOCK == 0 and inputs % BLOCK == 0 and weight.numel() > 0
    return stride == 1 and kernel == [3, 3] and whole and weight.dtype == torch.float32


def convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    padding: tuple[int, int, int, int],
    residual: torch.Tensor | None = None,
    relu: bool = False,
) -> torch.Tensor:
    """`conv2d` of stride 1, where `takes` allows it.

    Args:
        x: `[B, H, W, Cin]`, fp32.
        weight: `[Cout, Cin, 3, 3]`, fastest in `torch.channels_last` memory.
        bias: `[Cout]` or None.
        padding: zeros at (left, right, top, bottom).
        residual: `[B, H', W', Cout]`.

    Returns:
        `[B, H', W', Cout]`.
    """
    left, right, top, bottom = padding
    height, width = x.shape[1] + top + bottom - 2, x.shape[2] + left + right - 2
    y = _by_tiles(TILE, x, weight, bias, (left, top), (math.ceil(height / 2), math.ceil(width / 2)), residual, relu)
    return y[:, :height, :width].contiguous()


def convolve_doubled(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`convolve`, with one pixel of padding, of `x` doubled by nearest neighbour: `[B, 2H, 2W, Cout]`."""
    return _by_tiles(DOUBLED, x, weight, bias, (1, 1), (x.shape[1], x.shape[2]), None, False)


@dataclass(frozen=True)
class Form:
    """One dimension of a tile of two results. Each function writes its sums into `out`, line by line.

    Attributes:
        products: of a tile.
        reads: pixels that a tile reads.
        step: pixels from one tile to the next.
        pixels, taps, results: of `reads` pixels, 3 taps and `products` products.
    """

    products: int
    reads: int
    step: int
    pixels: Callable[[Lines, Lines], None]
    taps: Callable[[Lines, Lines], None]
    results: Callable[[Lines, Lines], None]


def _pixels(d: Lines, out: Lines) -> None:
    torch.sub(d[0], d[2], out=out[0])
    torch.add(d[1], d[2], out=out[1])
    torch.sub(d[2], d[1], out=out[2])
    torch.sub(d[1], d[3], out=out[3])


def _taps(g: Lines, out: Lines) -> None:
    out[0].copy_(g[0])
    torch.add(g[0], g[2], out=out[2]).mul_(0.5)
    torch.add(out[2], g[1], alpha=0.5, out=out[1])
    out[2].sub_(g[1], alpha=0.5)
    out[3].copy_(g[2])


def _results(m: Lines, out: Lines) -> None:
    torch.add(m[1], m[2], out=out[0]).add_(m[0])
    torch.sub(m[1], m[2], out=out[1]).sub_(m[3])


def _pixels_doubled(s: Lines, out: Lines) -> None:
    torch.sub(s[0], s[1], out=out[0])
    out[1].copy_(s[1])
    torch.sub(s[1], s[2], out=out[2])


def _taps_doubled(g: Lines, out: Lines) -> None:
    out[0].copy_(g[0])
    torch.add(g[0], g[1], out=out[1]).add_(g[2])
    out[2].copy_(g[2])


def _results_doubled(m: Lines, out: Lines) -> None:
    torch.add(m[0], m[1], out=out[0])
    torch.sub(m[1], m[2], out=out[1])


TILE = Form(4, 4, 2, _pixels, _taps, _results)
DOUBLED = Form(3, 3, 1, _pixels_doubled, _taps_doubled, _results_doubled)


def _by_tiles(
    form: Form,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    before: tuple[int, int],
    tiles: tuple[int, int],
    residual: torch.Tensor | None,
    relu: bool,
) -> torch.Tensor:
    """All `tiles` (rows, columns) of two by two results: `[B, 2 rows, 2 columns, Cout]`.

    before: zeros (left, above). What the tiles read beyond the right and the lower edge is zero too.
    """
    batch, outputs, (rows, columns) = len(x), len(weight), tiles
    strips = math.ceil(rows / max(1, STRIP * torch.get_num_threads() // columns))
    strip = math.ceil(rows / strips)
    chunks = list(_chunks(form, weight, bias, strip * columns))
    scratch = Scratch(form, x, strip, columns, outputs)
    y = x.new_empty(batch, 2 * rows, 2 * columns, outputs)
    if residual is not None and residual.shape != y.shape:
        residual = F.pad(residual, (0, 0, 0, y.shape[2] - residual.shape[2], 0, y.shape[1] - residual.shape[1]))
    for image in range(batch):
        for begin in range(0, rows, strip):
            first = min(begin, rows - strip)  # every strip is whole, since the weights are packed for its size
            read = scratch.read(x[image], before, first)
            place = slice(2 * first, 2 * (first + strip))
            out = y[image, place]
            for part, packed, constant in chunks:
                scratch.write(onednn.products(read, packed, constant), out[..., part])
            if residual is not None:
                out.add_(residual[image, place])
            if relu:
                out.relu_()
    return y


class Scratch:
    """The sums of a strip's pixels and products, in memory that every strip uses again."""

    def __init__(self, form: Form, x: torch.Tensor, rows: int, columns: int, outputs: int):
        channels = x.shape[-1]
        self.form, self.rows, self.columns = form, rows, columns
        self.width = form.step * (columns - 1) + form.reads
        self.lines = x.new_empty(form.products, rows, self.width, channels)
        self.tiles = x.new_empty(rows, columns, form.products, form.products, channels)
        self.halves = x.new_empty(2 * rows * columns * form.products * outputs)

    def read(self, image: torch.Tensor, before: tuple[int, int], first: int) -> torch.Tensor:
        """The sums of pixels for the strip whose first row of tiles is `first`: `[tiles, products^2, Cin]`."""
        form, (left, above), (height, width, _) = self.form, before, image.shape
        begin = form.step * first - above
        end = begin + form.step * (self.rows - 1) + form.reads
        seen = image[max(begin, 0) : max(min(end, height), 0)]
        if begin < 0 or end > height:
            seen = F.pad(seen, (0, 0, 0, 0, max(-begin, 0), end - max(begin, 0) - len(seen)))
        self.lines[:, :, :left] = 0
        self.lines[:, :, left + width :] = 0
        form.pixels(self._shifted(seen, self.rows, 0), self.lines[:, :, left : left + width].unbind(0))
        form.pixels(self._shifted(self.lines.permute(1, 2, 0, 3), self.columns, 1), self.tiles.unbind(3))
        return self.tiles.view(self.rows * self.columns, form.products**2, -1)

    def _shifted(self, lines: torch.Tensor, count: int, dim: int) -> list[torch.Tensor]:
        """Line k of each of `count` tiles along `dim`, for all k that a tile reads."""
        every = (slice(None),) * dim + (slice(None, None, self.form.step),)
        span = self.form.step * (count - 1) + 1
        return [lines.narrow(dim, k, span)[every] for k in range(self.form.reads)]

    def write(self, products: torch.Tensor, out: torch.Tensor) -> None:
        """The results `[2 rows, 2 columns, channels]` of `[tiles, products^2 * channels]`."""
        rows, columns, form = self.rows, self.columns, self.form
        channels = out.shape[-1]
        by_row = products.view(rows, columns, form.products, form.products, channels)
        halves = self.halves[: 2 * by_row.numel() // form.products]
        halves = halves.view(2, rows, columns, form.products, channels)
        form.results(by_row.unbind(2), halves.unbind(0))
        pairs = out.unflatten(1, (columns, 2)).unflatten(0, (rows, 2)).transpose(0, 1)
        form.results(halves.unbind(3), pairs.unbind(3))


def _chunks(
    form: Form, weight: torch.Tensor, bias: torch.Tensor | None, tiles: int
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor | None]]:
    """Runs of output channels: the run, its packed sums of weights, its bias for all products."""
    outputs, inputs = weight.shape[:2]
    products = form.products**2
    channels = min(outputs, max(1, CHUNK // (products * inputs * BLOCK)) * BLOCK)
    for first in range(0, outputs, channels):
        part = slice(first, min(first + channels, outputs))
        constant = None
        if bias is not None:  # of product (1, 1), which is added to all results of the tile
            constant = bias.new_zeros(products, part.stop - first)
            constant[form.products + 1] = bias[part]
            constant = constant.flatten()
        yield part, onednn.pack_products(_summed(form, weight[part]), tiles), constant


def _summed(form: Form, weight: torch.Tensor) -> torch.Tensor:
    """The sums of taps: `[products^2, Cout, Cin]`."""
    outputs, inputs = weight.shape[:2]
    out = weight.new_empty(form.products, form.products, outputs, inputs)
    half = weight.new_empty(form.products, 3, min(SCRATCH, outputs), inputs)
    taps = weight.detach().permute(2, 3, 0, 1)
    for first in range(0, outputs, SCRATCH):
        part = taps[:, :, first : first + SCRATCH]
        rows = half[:, :, : part.shape[2]]
        form.taps(part.unbind(0), rows.unbind(0))
        form.taps(rows.unbind(1), out[:, :, first : first + SCRATCH].unbind(1))
    return out.flatten(0, 1)
