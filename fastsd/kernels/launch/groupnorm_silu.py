"""Launches of `groupnorm_silu`: on chip in one launch, or a reduction that is split over the pixels."""

from __future__ import annotations

import functools
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """What an architecture class allows.

    held: most elements, padded to powers of two, that one program keeps in registers. held_per_warp: elements a
    warp. row_bytes: a program of the split path reads at least so many neighbouring bytes of a pixel, if it can.
    tile: elements of its tile; warps: of its programs. programs: how many programs an image is split into at least,
    where it has the pixels. apply_tiles: tiles that one program of the second launch writes. merge: with more splits
    than these, a launch of its own merges them, since every program of the second launch would read them all.
    """

    held: int = 32768
    held_per_warp: int = 2048
    row_bytes: int = 128
    tile: int = 4096
    warps: int = 4
    programs: int = 128
    apply_tiles: int = 4
    merge: int = 64


# Chosen by compiled code (registers, spills, width of the loads) and estimates; no row has been timed yet.
TABLE: dict[int, Row] = {
    75: Row(held=16384, programs=64),
    80: Row(),
    86: Row(),
    90: Row(),
    100: Row(),
    120: Row(),
}


@dataclass(frozen=True)
class Launch:
    """One call's launch.

    groups: groups of one program. block_p: pixels of its tile. warps: of every program. split_pixels: pixels that one
    program of the statistics sums, a multiple of block_p; 0 for the one launch that keeps everything on chip.
    apply_pixels: pixels that one program of the second launch writes. merge: whether a launch between merges the
    splits.
    """

    groups: int
    block_p: int
    warps: int
    split_pixels: int = 0
    apply_pixels: int = 0
    merge: bool = False


def power_of_two(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << (n - 1).bit_length()


@functools.lru_cache(maxsize=1024)
def choose(architecture: int, pixels: int, channels: int, groups: int, itemsize: int) -> Launch:
    """The launch for `[B, pixels, channels]`. It does not depend on B: a batch must not change an image's sums."""
    row, size = TABLE[architecture], channels // groups
    divisors = [g for g in range(1, groups + 1) if groups % g == 0]
    # Fewest groups first: most programs. A row of whole 16-byte vectors is read best, of 8-byte vectors well enough.
    for vector in (16, 8):
        for g in divisors:
            elements = power_of_two(pixels) * power_of_two(g * size)
            if g * size * itemsize % vector == 0 and elements <= row.held:
                return Launch(g, power_of_two(pixels), min(max(elements // row.held_per_warp, 1), 16))
    aligned = [g for g in divisors if g * size * itemsize % 16 == 0] or [groups]
    g = next((g for g in aligned if g * size * itemsize >= row.row_bytes), aligned[-1])
    if power_of_two(g * size) > row.tile:  # few groups with thousands of channels
        g = 1
    block_p = max(row.tile // power_of_two(g * size), 1)
    splits = max(row.programs * g // groups, 1)
    split_pixels = -(-pixels // (splits * block_p)) * block_p
    splits = -(-pixels // split_pixels)
    return Launch(g, block_p, row.warps, split_pixels, block_p * row.apply_tiles, splits > row.merge)
