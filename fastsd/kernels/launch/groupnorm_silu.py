"""Launches of `groupnorm_silu`: one launch where the cache of a multiprocessor holds the pixels, else a split one."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from fastsd.kernels.launch.tuned import tunable


@dataclass(frozen=True)
class GroupNormSettings:
    """What an architecture class gets.

    whole: most bytes of x that one program reads twice, the second time from the first-level cache; whole_tile,
    whole_warps: elements of its tile, and its warps. row_bytes: a program of the split path reads at least so many
    neighbouring bytes of a pixel, if it can; tile, warps: as above. programs: an image is split into so many programs,
    as long as each has split_tiles tiles. apply_tiles: tiles that one program of the second launch writes. merge:
    with more splits than these a launch of its own merges them, since every program of the second would read them
    all.
    """

    whole: int = 49152
    whole_tile: int = 8192
    whole_warps: int = 16
    row_bytes: int = 128
    tile: int = 4096
    warps: int = 4
    programs: int = 512
    split_tiles: int = 4
    apply_tiles: int = 4
    merge: int = 64


# Chosen by compiled code (registers, spills, width of the loads) and estimates; no row has been timed yet.
TABLE: dict[int, GroupNormSettings] = {
    75: GroupNormSettings(whole=24576, programs=160),  # 32 KiB of first-level cache
    80: GroupNormSettings(),
    86: GroupNormSettings(),
    90: GroupNormSettings(),
    100: GroupNormSettings(),
    120: GroupNormSettings(),
}


@dataclass(frozen=True)
class GroupNormLaunch:
    """One call's launch.

    groups: groups of one program. block_p: pixels of its tile. warps: of every program. split_pixels: pixels that one
    program of the statistics sums; 0 for one launch that does it all. apply_pixels: pixels that one program of the
    second launch writes. merge: whether a launch between merges the splits.
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


@tunable("groupnorm_silu", GroupNormLaunch)
@functools.lru_cache(maxsize=1024)
def choose(architecture: int, pixels: int, channels: int, groups: int, itemsize: int) -> GroupNormLaunch:
    """The launch for `[B, pixels, channels]`. It does not depend on B: a batch must not change an image's sums."""
    row, size = TABLE[architecture], channels // groups
    divisors = [g for g in range(1, groups + 1) if groups % g == 0]  # fewest groups first: most programs
    # A pixel's part is read best in vectors of 16 bytes, well enough in those of 8.
    for vector in (16, 8):
        for g in divisors:
            part = g * size * itemsize
            if part % vector == 0 and part * pixels <= row.whole:
                return _whole(row, pixels, g, size)
    # The narrowest part that is whole 32-byte sectors of memory and wide enough, or as near to that as there is.
    aligned = next((found for n in (32, 16, 8) if (found := [g for g in divisors if g * size * itemsize % n == 0])), [])
    candidates = [g for g in aligned or divisors if power_of_two(g * size) <= row.tile] or [1]
    g = next((g for g in candidates if g * size * itemsize >= row.row_bytes), candidates[-1])
    if g * size * itemsize * pixels <= row.whole:
        return _whole(row, pixels, g, size)
    block_p = max(row.tile // power_of_two(g * size), 1)
    split_pixels = max(-(-pixels * groups // (row.programs * g * block_p)), row.split_tiles) * block_p
    splits = -(-pixels // split_pixels)
    return GroupNormLaunch(g, block_p, row.warps, split_pixels, block_p * row.apply_tiles, splits > row.merge)


def _whole(row: GroupNormSettings, pixels: int, groups: int, size: int) -> GroupNormLaunch:
    columns = power_of_two(groups * size)
    block_p = min(max(row.whole_tile // columns, 1), power_of_two(pixels))
    return GroupNormLaunch(groups, block_p, max(row.whole_warps * block_p * columns // row.whole_tile, 1))
