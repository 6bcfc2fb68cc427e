"""Launches of the gradients of `flash_attn`: the tiles of both kernels, and parts of the queries."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from fastsd.kernels.launch.flash_attn import WIDEST, Tile, in_parts

PROGRAMS = 128  # of an image, below which the queries are summed in parts, if each part has FEWEST_BLOCKS of them
FEWEST_BLOCKS = 4


@dataclass(frozen=True)
class AttentionGradients:
    """The launches of one backward pass.

    Attributes:
        of_queries: a program has `rows` queries and loops over blocks of `keys`.
        of_keys: a program has `keys` keys and loops over blocks of `rows` queries.
        run: queries of a program of `of_keys`; each run's sums are written apart, and added.
    """

    of_queries: Tile
    of_keys: Tile
    run: int


# Tiles by class and the largest head size, of the kernels for queries and for keys; the first match is used. Both hold
# a block of two tensors and its sums, so that the tiles are smaller than in the forward pass. Chosen by compiled code,
# see docs/kernels.md; none is timed yet.
TABLE: dict[int, dict[int, tuple[Tile, Tile]]] = {
    80: {
        48: (Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)),
        96: (Tile(64, 32, 4, 2), Tile(32, 64, 4, 2)),
        128: (Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
        WIDEST: (Tile(64, 16, 4, 2), Tile(16, 64, 8, 2)),
    },
    90: {
        64: (Tile(128, 64, 8, 2, padded=True), Tile(64, 64, 4, 2, padded=True)),
        80: (Tile(128, 64, 8, 2), Tile(64, 64, 4, 2)),
        WIDEST: (Tile(128, 64, 8, 2), Tile(32, 64, 4, 2)),
    },
    100: {
        80: (Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)),
        128: (Tile(128, 64, 8, 2), Tile(64, 64, 4, 2)),
        WIDEST: (Tile(128, 64, 8, 2), Tile(32, 64, 4, 2)),
    },
}
TABLE[86] = TABLE[120] = TABLE[80]


@functools.lru_cache(maxsize=1024)
def choose(architecture: int, queries: int, keys: int, heads: int, size: int) -> AttentionGradients:
    """The launches for queries `[B, queries, heads, size]` in 16 bits. They do not depend on B."""
    tiles = next(tiles for widest, tiles in TABLE[architecture].items() if size <= widest)
    of_queries, of_keys = (in_parts(tile, size) for tile in tiles)
    blocks = -(-queries // of_keys.rows)
    programs = -(-keys // of_keys.keys) * heads
    parts = max(min(PROGRAMS // programs, blocks // FEWEST_BLOCKS), 1)
    return AttentionGradients(of_queries, of_keys, -(-blocks // parts) * of_keys.rows)
