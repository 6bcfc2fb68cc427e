"""Launches of `flash_attn`: which kernel takes a call, and with which tiles."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Tile:
    """The launch for long sequences: a program loops over its keys.

    Attributes:
        rows, keys: queries of a program; keys of one iteration.
        padded: the head is one part, a power of two that may exceed it; otherwise two parts, see `split`.
        registers: the limit per thread, if the compiler would exceed what lets two programs share a multiprocessor.
        parts: of the head; `in_parts` sets them.
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
    """The launch for few keys: `blocks` times `rows` queries per program; head and keys in two parts each."""

    rows: int
    blocks: int
    warps: int
    stages: int
    parts: tuple[int, int]
    keys: tuple[int, int]


@dataclass(frozen=True)
class Wide:
    """The launch for wide heads: at most `scores` fp32 scores at a time, and `block` of a row in the softmax."""

    scores: int = 2**24
    block: int = 1024
    warps: int = 4


# Classes on which PyTorch's attention takes every call, and why.
UNUSED = {75: "on sm_75 Triton computes products without tensor cores and spills; the kernel needs sm_80 or newer"}

WIDEST = 160  # the largest head size of the tiled kernels
FEW = 128  # the most keys that stay on chip, in 16 bits
# The largest product of keys and head size that fits into shared memory twice, beside a block of queries.
RESIDENT = {80: 128 * 160, 86: 128 * 128, 90: 128 * 160, 100: 128 * 160, 120: 128 * 128}

# 16-bit tiles by class and (largest head size, fewest queries); the first match is used. Chosen by compiled code and
# estimates, see docs/kernels.md; none is timed yet.
TABLE: dict[int, dict[tuple[int, int], Tile]] = {
    80: {
        (32, 0): Tile(128, 64, 4, 3),
        (48, 0): Tile(128, 64, 8, 3),  # 32 + 16: products bound it, so padding to 64 would cost time
        (64, 0): Tile(128, 64, 4, 3),
        (80, 0): Tile(64, 64, 4, 3),
        (128, 0): Tile(64, 64, 4, 2),
        (WIDEST, 0): Tile(64, 32, 4, 2),  # 64 keys would spill
    },
    90: {
        # Two programs per multiprocessor: one multiplies while the other computes exponentials. For heads of 40, a
        # second part saves no time, because its products wait for those of the first.
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
TABLE[86] = TABLE[80]  # the tiles fit into the 99 KiB of shared memory of sm_86 and sm_89
# The larger tiles of sm_80 would spill on sm_120.
TABLE[120] = TABLE[80] | {
    (64, 0): Tile(64, 64, 4, 3),
    (128, 0): Tile(64, 32, 4, 2),
    (WIDEST, 0): Tile(32, 32, 4, 2),
}
# Exact fp32 products use no tensor cores; larger tiles or fewer warps would spill.
FLOAT32 = {(80, 0): Tile(32, 32, 8, 1), (WIDEST, 0): Tile(32, 16, 8, 1)}


def split(size: int) -> tuple[int, int]:
    """The two powers of two, at least 16 or 0, that cover `size` with the least excess: 80 = 64 + 16."""
    first = max(1 << (size.bit_length() - 1), 16)
    rest = max(size - first, 0)
    second = _power_of_two(rest) if rest else 0
    return (first, second) if second < first else (2 * first, 0)


@functools.lru_cache(maxsize=1024)
def choose(architecture: int, queries: int, keys: int, heads: int, size: int, itemsize: int) -> Tile | FewKeys | Wide:
    """The launch for queries `[B, queries, heads, size]`. It does not depend on B, so that a batch changes no sums."""
    if size > WIDEST:
        return Wide()
    parts = split(size)
    resident = sum(parts) * sum(split(keys))
    if itemsize == 2 and keys <= FEW and resident <= RESIDENT[architecture]:
        # As many blocks per program as leave 64 programs per image: two images then occupy every multiprocessor.
        blocks = min(max(-(-queries // 64) * heads // 64, 1), 4)
        # With more resident keys, prefetched queries exceed the registers: Triton 3.9 would spill.
        return FewKeys(64, blocks, 4, 1 if resident > 80 * 128 else 2, parts, split(keys))
    return tile_of(architecture, queries, size, itemsize)


def tile_of(architecture: int, queries: int, size: int, itemsize: int) -> Tile:
    """The launch of the kernel for long sequences, for heads of up to `WIDEST`."""
    table = TABLE[architecture] if itemsize == 2 else FLOAT32
    tile = next(tile for (widest, fewest), tile in table.items() if size <= widest and queries >= fewest)
    return in_parts(tile, size)


def in_parts(tile: Tile, size: int) -> Tile:
    """The tile for heads of `size`."""
    return replace(tile, parts=(_power_of_two(size), 0) if tile.padded else split(size))


def _power_of_two(n: int) -> int:
    """The smallest power of two >= n and >= 16, the fewest columns of a product."""
    return max(1 << (n - 1).bit_length(), 16)
