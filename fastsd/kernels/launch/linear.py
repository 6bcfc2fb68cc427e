"""Launches of `linear` and of the product of `geglu`: the tile that a model of the card finds fastest."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Gemm:
    """The launch of a product.

    Attributes:
        rows: of a program's tile.
        columns, more: of the tile, in two parts (160 = 128 + 32); `more` may be 0. For `geglu`, of value and of gate.
        depth: columns of K in one iteration.
        splits: parts of K, summed by different programs and then, in their order, by a second launch.
        tma: operands come as tensor descriptors.
    """

    rows: int
    columns: int
    more: int
    depth: int
    warps: int
    stages: int
    splits: int = 1
    tma: bool = False


@dataclass(frozen=True)
class Card:
    """What the model knows of an architecture class, for a typical card of it.

    Attributes:
        multiprocessors: of that card.
        flop: of dense 16-bit products, per multiprocessor and clock.
        bytes: of memory, per multiprocessor and clock.
        tiles, gated: launches of `linear` and of `geglu`, each with the share of `flop` that its loop is estimated to
            reach if every multiprocessor has a program.
    """

    multiprocessors: int
    flop: int
    bytes: float
    tiles: tuple[tuple[Gemm, float], ...]
    gated: tuple[tuple[Gemm, float], ...]


# Classes for which the kernel is not used, and why.
UNUSED = {75: "on sm_75 Triton computes products without tensor cores and spills; the kernel needs sm_80 or newer"}

START = 2000  # clocks of a program before its first and after its last product (estimated)
LAUNCH = 4000  # clocks of the second launch of a split product, in a graph (estimated)
STEPS = 6  # the fewest iterations of a program of a split product
MOST_SPLITS = 16

_ASYNC = (
    (Gemm(128, 128, 0, 64, 8, 3), 0.65),
    (Gemm(128, 128, 32, 64, 8, 2), 0.62),
    (Gemm(64, 128, 0, 64, 4, 3), 0.58),
    (Gemm(64, 64, 0, 64, 4, 3), 0.45),
)
_ASYNC_GATED = ((Gemm(128, 64, 64, 64, 8, 3), 0.65), (Gemm(64, 64, 64, 64, 4, 3), 0.58))
_TMA = (
    (Gemm(128, 128, 0, 64, 8, 4, tma=True), 0.70),
    (Gemm(128, 128, 32, 64, 8, 4, tma=True), 0.70),
    (Gemm(64, 128, 0, 64, 4, 4, tma=True), 0.60),
    (Gemm(64, 64, 0, 64, 4, 4, tma=True), 0.45),
)
_TMA_GATED = ((Gemm(128, 128, 128, 64, 8, 3, tma=True), 0.70), (Gemm(128, 64, 64, 64, 4, 3, tma=True), 0.62))


def _with_tma(tiles: tuple[tuple[Gemm, float], ...]) -> tuple[tuple[Gemm, float], ...]:
    return tuple((replace(tile, tma=True), share) for tile, share in tiles)


# Tiles are chosen by compiled code (registers, spills, shared memory), shares are estimates; none is timed yet.
TABLE: dict[int, Card] = {
    80: Card(108, 2048, 13.4, _ASYNC, _ASYNC_GATED),
    86: Card(84, 512, 6.7, _ASYNC, _ASYNC_GATED),
    90: Card(132, 4096, 14.5, _TMA, _TMA_GATED),
    100: Card(148, 8192, 29.2, _TMA, _TMA_GATED),
    120: Card(170, 512, 4.4, _with_tma(_ASYNC), _with_tma(_ASYNC_GATED)),
}

# From sm_89 on: an iteration takes as many bytes, which are twice as many columns of K.
FP8: dict[int, Card] = {
    architecture: replace(
        card,
        flop=2 * card.flop,
        tiles=tuple((replace(tile, depth=128), share) for tile, share in card.tiles),
        gated=tuple((replace(tile, depth=128), share) for tile, share in card.gated),
    )
    for architecture, card in TABLE.items()
    if architecture > 80
}
# With 128 columns each, values, gates and their scales would spill.
FP8[100] = replace(FP8[100], gated=((Gemm(128, 64, 64, 128, 8, 3, tma=True), 0.62),))
UNIT_FP8 = 16  # elements of 16 bytes, of which K is a multiple
# Columns after which sums of fp8 products move to fp32 registers: sm_90's tensor cores keep some 14 bits of them.
EXACT = {90: 128}


@functools.lru_cache(maxsize=1024)
def choose(architecture: int, rows: int, columns: int, depth: int, gated: int, itemsize: int) -> Gemm:
    """The launch of `[rows, depth]` by `[columns, depth]`: the one of the table with the fewest modelled clocks.

    gated: 1 for `geglu`, whose weight has twice as many rows as its result has `columns`.
    itemsize: 1 for fp8, with twice the columns of K in the bytes of an iteration, and twice the products per clock.
    """
    return ranked(architecture, rows, columns, depth, gated, itemsize)[0]


def ranked(architecture: int, rows: int, columns: int, depth: int, gated: int, itemsize: int) -> list[Gemm]:
    """The best launch of each tile of the table, the one with the fewest modelled clocks first."""
    card, found = (FP8 if itemsize == 1 else TABLE)[architecture], []
    for tile, share in card.gated if gated else card.tiles:
        best: tuple[float, Gemm] | None = None
        for splits in (1,) if gated else range(1, MOST_SPLITS + 1):
            if splits > 1 and depth < splits * STEPS * tile.depth:
                break
            needed = clocks(card, tile, share, rows, columns, depth, splits, bool(gated)), replace(tile, splits=splits)
            best = needed if best is None or needed[0] < best[0] else best
        assert best is not None
        found.append(best)
    return [launch for _, launch in sorted(found, key=lambda pair: pair[0])]


def clocks(
    card: Card, tile: Gemm, share: float, rows: int, columns: int, depth: int, splits: int, gated: bool
) -> float:
    """The modelled clocks of a launch: those of the multiprocessor with the most programs."""
    width = tile.columns if gated else tile.columns + tile.more
    programs = -(-rows // tile.rows) * -(-columns // width) * splits
    steps = -(-depth // (tile.depth * splits))
    flop = 2 * tile.rows * (tile.columns + tile.more) * tile.depth * steps
    per_program = flop / (card.flop * share) + START
    total = -(-programs // card.multiprocessors) * per_program
    if splits > 1:  # the parts are written and read, in fp32
        total += LAUNCH + 8 * splits * rows * columns / (card.bytes * card.multiprocessors)
    return total
