"""Launches of `flash_attn`: which kernel takes a call, and with which tiles."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from fastsd.kernels.launch.tuned import tunable


@dataclass(frozen=True)
class Tile:
    """Long sequences: `rows` queries against `keys` keys at a time.

    padded: the head as one part of a power of two, reaching past its end; else in two, see `split`. registers: most
    that a thread may have, so that two programs fit a multiprocessor, where the compiler would take a few more.
    parts: of the head; `choose` fills it in.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    padded: bool = False
    registers: int | None = None
    parts: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class FewKeys:
    """Few keys: `blocks` times `rows` queries a program; head and keys in two parts each."""

    rows: int
    blocks: int
    warps: int
    stages: int
    parts: tuple[int, int]
    keys: tuple[int, int]


@dataclass(frozen=True)
class Wide:
    """Wide heads: at most `scores` fp32 scores at a time; the softmax goes by `block` of a row."""

    scores: int = 2**24
    block: int = 1024
    warps: int = 4


# Classes whose calls go to PyTorch's attention, and why.
UNUSED = {75: "on sm_75 Triton computes products without tensor cores and spills; the kernel needs sm_80 or newer"}

WIDEST = 160  # head size that the tiled kernels take
FEW = 128  # keys that stay on chip, in 16 bits
# Keys times head size that fit shared memory twice, with a block of queries.
RESIDENT = {80: 128 * 160, 86: 128 * 128, 90: 128 * 160, 100: 128 * 160, 120: 128 * 128}

# For each class: the 16-bit tile by (largest head size, fewest queries); the first that fits is taken. Chosen by
# compiled code and estimates, docs/kernels.md has the figures; no tile has been timed yet.
TABLE: dict[int, dict[tuple[int, int], Tile]] = {
    80: {
        (32, 0): Tile(128, 64, 4, 3),
        (48, 0): Tile(128, 64, 8, 3),  # 32 + 16: products bound it there, so that padding to 64 would cost
        (64, 0): Tile(128, 64, 4, 3),
        (80, 0): Tile(64, 64, 4, 3),
        (128, 0): Tile(64, 64, 4, 2),
        (WIDEST, 0): Tile(64, 32, 4, 2),  # 64 keys would spill
    },
    90: {
        # Two programs a multiprocessor, so that one multiplies while the other takes exponentials. At 40 a second part
        # saves no time: a wait between its products and the first part's eats what it saves.
        (64, 2048): Tile(128, 64, 8, 3, padded=True, registers=128),
        (64, 0): Tile(64, 64, 4, 3, padded=True),
        (96, 0): Tile(64, 64, 4, 3),
        (WIDEST, 0): Tile(64, 64, 4, 2),
    },
    100: {
        (64, 2048): Tile(128, 128, 8, 2, padded=True),
        (64, 0): Tile(64, 64, 4, 3, padded=True),
        (80, 0): Tile(128, 128, 8, 2),
        (WIDEST, 0): Tile(128, 64, 8, 2),
    },
}
TABLE[86] = TABLE[80]  # sm_86 and 89 have 99 KiB of shared memory, and no use for more here
# The same would spill there.
TABLE[120] = TABLE[80] | {
    (64, 0): Tile(64, 64, 4, 3),
    (128, 0): Tile(64, 32, 4, 2),
    (WIDEST, 0): Tile(32, 32, 4, 2),
}
# Exact fp32 products have no tensor cores; larger tiles, or fewer warps, would spill.
FLOAT32 = {(80, 0): Tile(32, 32, 8, 1), (WIDEST, 0): Tile(32, 16, 8, 1)}


def split(size: int) -> tuple[int, int]:
    """Two powers of two, 16 at least or the second 0, that cover `size` with the least to spare: 80 = 64 + 16."""
    first = max(1 << (size.bit_length() - 1), 16)
    rest = max(size - first, 0)
    second = _power_of_two(rest) if rest else 0
    return (first, second) if second < first else (2 * first, 0)


@tunable("flash_attn", Tile, FewKeys, Wide)
@functools.lru_cache(maxsize=1024)
def choose(architecture: int, queries: int, keys: int, heads: int, size: int, itemsize: int) -> Tile | FewKeys | Wide:
    """The launch for queries `[B, queries, heads, size]`.

    It does not depend on B: a batch must not change an image's sums.
    """
    if size > WIDEST:
        return Wide()
    parts = split(size)
    resident = sum(parts) * sum(split(keys))
    if itemsize == 2 and keys <= FEW and resident <= RESIDENT[architecture]:
        # As many blocks of queries a program as leave 64 programs an image, so that two images fill the processors.
        blocks = min(max(-(-queries // 64) * heads // 64, 1), 4)
        # Beside more keys than these, queries loaded ahead find no registers: Triton 3.9 would spill.
        return FewKeys(64, blocks, 4, 1 if resident > 80 * 128 else 2, parts, split(keys))
    table = TABLE[architecture] if itemsize == 2 else FLOAT32
    tile = next(tile for (widest, fewest), tile in table.items() if size <= widest and queries >= fewest)
    return replace(tile, parts=(_power_of_two(size), 0) if tile.padded else parts)


def _power_of_two(n: int) -> int:
    """The least power of two that is not below n, 16 at least: products take no fewer columns."""
    return max(1 << (n - 1).bit_length(), 16)
