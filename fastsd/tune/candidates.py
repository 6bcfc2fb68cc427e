"""The candidate launches for an op and its sizes, the committed launch first.

The lists are deliberately wide: the search rejects a launch that does not compile, does not fit or is wrong.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from fastsd.kernels.launch import flash_attn, groupnorm_silu, linear, rowwise
from fastsd.kernels.launch.groupnorm_silu import power_of_two
from fastsd.kernels.launch.tuned import Lookup


def candidates(lookup: Lookup, committed: Any) -> list[Any]:
    """Distinct launches for `lookup`, `committed` first."""
    others: Iterator[Any]
    if isinstance(committed, groupnorm_silu.GroupNormLaunch):
        others = _groupnorm(committed, *lookup.key)
    elif isinstance(committed, rowwise.RowwiseLaunch):
        others = _rowwise(lookup.op, committed)
    elif isinstance(committed, flash_attn.Tile):
        others = _tiles(committed, lookup.key[3])
    elif isinstance(committed, flash_attn.FewKeys):
        others = _few_keys(committed)
    elif isinstance(committed, linear.Gemm):
        others = _products(committed, lookup.architecture, *lookup.key)
    else:
        others = iter(())
    return list(dict.fromkeys([committed, *others]))


def _groupnorm(
    committed: groupnorm_silu.GroupNormLaunch, pixels: int, channels: int, groups: int, itemsize: int
) -> Iterator[groupnorm_silu.GroupNormLaunch]:
    size = channels // groups
    near = {committed.groups // 2, committed.groups, 2 * committed.groups}
    divisors = [g for g in sorted(near) if g and groups % g == 0]
    for g, tile, warps in itertools.product(divisors, (2048, 4096, 8192), (4, 8, 16)):
        block_p = min(max(tile // power_of_two(g * size), 1), power_of_two(pixels))
        yield groupnorm_silu.GroupNormLaunch(g, block_p, warps)
        for programs, tiles in itertools.product((128, 512), (1, 4)):
            split = max(-(-pixels * groups // (programs * g * block_p)), 1) * block_p
            if split < pixels:
                merge = -(-pixels // split) > 64
                yield groupnorm_silu.GroupNormLaunch(g, block_p, warps, split, block_p * tiles, merge)


def _rowwise(op: str, committed: rowwise.RowwiseLaunch) -> Iterator[rowwise.RowwiseLaunch]:
    columns = [committed.block_columns] if op == "layernorm" else [128, 256, 512, 1024]
    heights = [1] if op == "advance" else [1, 2, 4, 8, 16]
    for height, width, warps in itertools.product(heights, columns, (1, 2, 4, 8, 16)):
        if height * width <= 16384 and height * width >= 32 * warps:
            yield rowwise.RowwiseLaunch(height, width, warps)


def _tiles(committed: flash_attn.Tile, size: int) -> Iterator[flash_attn.Tile]:
    whole = max(power_of_two(size), 16), 0
    parts = {True: whole, False: flash_attn.split(size)}
    for queries, keys, warps, stages, padded, registers in itertools.product(
        (64, 128), (32, 64, 128), (4, 8), (2, 3, 4), (True, False), (None, 128)
    ):
        if registers is None or warps == 8:
            yield replace(
                committed, rows=queries, keys=keys, warps=warps, stages=stages, padded=padded, registers=registers,
                parts=parts[padded],
            )  # fmt: skip


def _few_keys(committed: flash_attn.FewKeys) -> Iterator[flash_attn.FewKeys]:
    for queries, blocks, warps in itertools.product((32, 64, 128), (1, 2, 4, 8), (4, 8)):
        yield replace(committed, rows=queries, blocks=blocks, warps=warps)


def _products(
    committed: linear.Gemm, architecture: int, rows: int, columns: int, depth: int, gated: int
) -> Iterator[linear.Gemm]:
    """160 columns are 128 + 32, also with 64 rows; values and gates have equally many columns."""
    widths = [(64, 64), (128, 128)] if gated else [(64, 0), (128, 0), (128, 32), (256, 0)]
    few = not gated and rows * columns < 2**20 and depth >= 1024
    for height, (first, more), warps, stages, splits, tma in itertools.product(
        (64, 128), widths, (4, 8), (3, 4), (1, 2, 4) if few else (1,), {False, architecture >= 90}
    ):
        if height * (first + more) >= 1024 * warps:  # at least 32 sums for each thread
            yield linear.Gemm(height, first, more, committed.depth, warps, stages, splits, tma)
