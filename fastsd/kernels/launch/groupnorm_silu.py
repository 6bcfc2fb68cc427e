"""Launches of `groupnorm_silu`: one kernel if a multiprocessor's cache holds the pixels, otherwise a split."""

from __future__ import annotations

import functools
from dataclasses import dataclass


@dataclass(frozen=True)
class GroupNormSettings:
    """The settings of an architecture class, from which `choose` derives a launch.

    Attributes:
        whole: the most bytes of x that one program reads twice, the second time from the first-level cache.
        whole_tile, whole_warps: elements of the tile of such a program, and its warps.
        row_bytes: the fewest adjacent bytes of a pixel that a program of the split path reads, if possible.
        tile, warps: elements of the tile of a program of the split path, and its warps.
        residual_warps: warps of the pass that finishes a convolution and takes the moments of the same tiles.
        programs: programs per image of the split path, if each then has `split_tiles` tiles; half as many, if the last
            launch can then merge the splits itself.
        split_tiles: the fewest tiles of a program that computes moments.
        apply_tiles: tiles that a program of the last launch writes.
        merge: the most splits that the programs of the last launch merge themselves.
    """

    whole: int = 49152
    whole_tile: int = 8192
    whole_warps: int = 16
    row_bytes: int = 128
    tile: int = 4096
    warps: int = 4
    residual_warps: int = 4
    programs: int = 512
    split_tiles: int = 4
    apply_tiles: int = 4
    merge: int = 64


# Chosen by compiled code (registers, spills, width of the loads) and estimates; none is timed yet.
TABLE: dict[int, GroupNormSettings] = {
    # 32 KiB of first-level cache; tiles of 8192 would spill under Triton 3.7.
    75: GroupNormSettings(whole=24576, whole_tile=4096, programs=160),
    80: GroupNormSettings(),
    86: GroupNormSettings(residual_warps=8),  # four would spill on sm_86
    90: GroupNormSettings(whole=131072),  # half of 256 KiB
    # As sm_90; tiles of 8192 would spill under Triton 3.6, and four warps of the split path under 3.7.
    100: GroupNormSettings(whole=131072, whole_tile=4096, warps=8),
    120: GroupNormSettings(),
}


@dataclass(frozen=True)
class GroupNormLaunch:
    """The launch of one call.

    Attributes:
        groups: groups per program.
        block_p: pixels of a tile.
        warps: of every program.
        split_pixels: pixels whose moments one program computes; 0 if one kernel does everything.
        apply_pixels: pixels that one program of the last launch writes.
        merge: a launch in between merges the splits.
    """

    groups: int
    block_p: int
    warps: int
    split_pixels: int = 0
    apply_pixels: int = 0
    merge: bool = False


def power_of_two(n: int) -> int:
    """The smallest power of two >= n."""
    return 1 << (n - 1).bit_length()


@functools.lru_cache(maxsize=1024)
def choose(architecture: int, pixels: int, channels: int, groups: int, itemsize: int) -> GroupNormLaunch:
    """The launch for `[B, pixels, channels]`. It does not depend on B, so that a batch changes no sums."""
    settings, size = TABLE[architecture], channels // groups
    divisors = [g for g in range(1, groups + 1) if groups % g == 0]  # ascending: fewer groups give more programs
    # Loads of 16 bytes are best, of 8 good enough.
    for vector in (16, 8):
        for g in divisors:
            part = g * size * itemsize
            if part % vector == 0 and part * pixels <= settings.whole:
                return _whole(settings, pixels, g, size)
    # The narrowest part of whole 32-byte memory sectors that is wide enough, or the nearest to that.
    by_alignment = ([g for g in divisors if g * size * itemsize % sector == 0] for sector in (32, 16, 8))
    aligned = next(filter(None, by_alignment), divisors)
    candidates = [g for g in aligned if power_of_two(g * size) <= settings.tile] or [1]
    g = next((g for g in candidates if g * size * itemsize >= settings.row_bytes), candidates[-1])
    if g * size * itemsize * pixels <= settings.whole:
        return _whole(settings, pixels, g, size)
    block_p = max(settings.tile // power_of_two(g * size), 1)
    split_pixels = max(-(-pixels * groups // (settings.programs * g * block_p)), settings.split_tiles) * block_p
    splits = -(-pixels // split_pixels)
    if splits > settings.merge and 2 * settings.merge * groups // g >= settings.programs:
        split_pixels = -(-pixels // (settings.merge * block_p)) * block_p
        splits = -(-pixels // split_pixels)
    return GroupNormLaunch(
        g, block_p, settings.warps, split_pixels, block_p * settings.apply_tiles, splits > settings.merge
    )


def _whole(settings: GroupNormSettings, pixels: int, groups: int, size: int) -> GroupNormLaunch:
    columns = power_of_two(groups * size)
    block_p = min(max(settings.whole_tile // columns, 1), power_of_two(pixels))
    warps = settings.whole_warps * block_p * columns // settings.whole_tile
    return GroupNormLaunch(groups, block_p, min(max(warps, 1), settings.whole_warps))
