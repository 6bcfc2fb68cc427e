"""The launches of our kernels to choose from: the committed one, and others that may be faster on some GPU.

The lists of all are deliberately wide: a launch that does not compile, does not fit or is wrong is left out where they
are tried. The short lists are for the first use of a shape, where each launch has to be compiled.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from fastsd.kernels.launch import conv2d, flash_attn, flash_attn_gradients, linear, rowwise
from fastsd.kernels.launch import groupnorm_silu as norm
from fastsd.kernels.launch.groupnorm_silu import power_of_two

SPILLING = (86, 120)  # classes on which the tile of `_padded` spills inside its loop, where keys are no whole blocks


def groupnorm_silu(thorough: bool, architecture: int, *sizes: int) -> list[norm.GroupNormLaunch]:
    """Launches for pixels, channels, groups, itemsize."""
    committed = norm.choose(architecture, *sizes)
    return _distinct(committed, _groupnorm(committed, *sizes) if thorough else ())


def rows(op: str, thorough: bool, architecture: int, *columns: int) -> list[rowwise.RowwiseLaunch]:
    """Launches of `layernorm` and `geglu` for rows of `columns`, and of `advance`."""
    committed = getattr(rowwise, op)(architecture, *columns)
    return _distinct(committed, _rowwise(op, committed) if thorough else ())


def attention(
    thorough: bool, architecture: int, queries: int, keys: int, heads: int, size: int, itemsize: int
) -> list[flash_attn.Tile | flash_attn.FewKeys | flash_attn.Wide]:
    """Launches of `flash_attn`; `Wide` is the only one of its kind."""
    committed = flash_attn.choose(architecture, queries, keys, heads, size, itemsize)
    if isinstance(committed, flash_attn.Tile):
        few = () if itemsize == 4 or size > 64 or architecture in SPILLING else [_padded(committed, size)]
        return _distinct(committed, _tiles(committed, size) if thorough else few)
    if isinstance(committed, flash_attn.FewKeys) and thorough:
        return _distinct(committed, _few_keys(committed))
    return [committed]


def attention_gradients(
    thorough: bool, architecture: int, *sizes: int
) -> list[flash_attn_gradients.AttentionGradients]:
    """Launches of the gradients of `flash_attn`, for queries, keys, heads, size. A first use has one: its two kernels
    are compiled."""
    committed = flash_attn_gradients.choose(architecture, *sizes)
    return _distinct(committed, _attention_gradients(committed, *sizes) if thorough else ())


def products(
    thorough: bool, architecture: int, rows: int, columns: int, depth: int, gated: int, itemsize: int
) -> list[linear.Gemm]:
    """Launches of `linear` and, gated, of `geglu`: for a first use the two tiles that the model finds fastest."""
    committed, *others = linear.ranked(architecture, rows, columns, depth, gated, itemsize)
    return _distinct(
        committed, _products(committed, architecture, rows, columns, depth, gated, itemsize) if thorough else others[:1]
    )


def convolutions(thorough: bool, architecture: int, *sizes: int) -> list[conv2d.ConvBoxes | conv2d.ConvPointers]:
    """Launches of `conv2d`, of the sizes of its `choose`. A first use has one: each is compiled for its channels."""
    committed = conv2d.choose(architecture, *sizes)
    return _distinct(committed, _convolutions(committed, *sizes) if thorough else ())


def _distinct(committed: Any, others: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys([committed, *others]))


def _padded(committed: flash_attn.Tile, size: int) -> flash_attn.Tile:
    """One part, 128 x 128, eight warps: on sm_90 the fewest instructions per score, as counted (docs/kernels.md)."""
    whole = max(power_of_two(size), 16), 0
    return replace(committed, rows=128, keys=128, warps=8, stages=2, padded=True, registers=None, parts=whole)


def _groupnorm(
    committed: norm.GroupNormLaunch, pixels: int, channels: int, groups: int, itemsize: int
) -> Iterator[norm.GroupNormLaunch]:
    size = channels // groups
    near = {committed.groups // 2, committed.groups, 2 * committed.groups}
    divisors = [g for g in sorted(near) if g and groups % g == 0]
    for g, tile, warps in itertools.product(divisors, (2048, 4096, 8192), (4, 8, 16)):
        block_p = min(max(tile // power_of_two(g * size), 1), power_of_two(pixels))
        yield norm.GroupNormLaunch(g, block_p, warps)
        for programs, tiles in itertools.product((128, 512), (1, 4)):
            split = max(-(-pixels * groups // (programs * g * block_p)), 1) * block_p
            if split < pixels:
                merge = -(-pixels // split) > 64
                yield norm.GroupNormLaunch(g, block_p, warps, split, block_p * tiles, merge)


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


def _attention_gradients(
    committed: flash_attn_gradients.AttentionGradients, queries: int, keys: int, heads: int, size: int
) -> Iterator[flash_attn_gradients.AttentionGradients]:
    """One of the two kernels in another tile, or the queries in other parts, beside what is committed of the rest."""
    in_two_parts = flash_attn.split(size)[1] > 0
    for held, passed, warps, stages, padded in itertools.product(
        (64, 128), (16, 32, 64, 128), (4, 8), (2, 3), (True, False) if in_two_parts else (committed.of_keys.padded,)
    ):
        tile = flash_attn.in_parts(flash_attn.Tile(held, passed, warps, stages, padded), size)
        yield replace(committed, of_queries=tile)
        run = -(-committed.run // passed) * passed
        yield replace(committed, of_keys=replace(tile, rows=passed, keys=held), run=run)
    rows = committed.of_keys.rows
    blocks = -(-queries // rows)
    for parts in (1, 2, 4, 8):
        if parts <= max(blocks // flash_attn_gradients.FEWEST_BLOCKS, 1):
            yield replace(committed, run=-(-blocks // parts) * rows)


def _few_keys(committed: flash_attn.FewKeys) -> Iterator[flash_attn.FewKeys]:
    for queries, blocks, warps in itertools.product((32, 64, 128), (1, 2, 4, 8), (4, 8)):
        yield replace(committed, rows=queries, blocks=blocks, warps=warps)


def _products(
    committed: linear.Gemm, architecture: int, rows: int, columns: int, depth: int, gated: int, itemsize: int
) -> Iterator[linear.Gemm]:
    """160 columns are 128 + 32, also with 64 rows; values and gates have equally many columns."""
    yield from linear.ranked(architecture, rows, columns, depth, gated, itemsize)
    widths = [(64, 64), (128, 128)] if gated else [(64, 0), (128, 0), (128, 32), (256, 0)]
    few = not gated and rows * columns < 2**20 and depth >= 1024
    for height, (first, more), warps, stages, splits, tma in itertools.product(
        (64, 128), widths, (4, 8), (3, 4), (1, 2, 4) if few else (1,), {False, architecture >= 90}
    ):
        if height * (first + more) >= 1024 * warps:  # at least 32 sums for each thread
            yield linear.Gemm(height, first, more, committed.depth, warps, stages, splits, tma)


def _convolutions(
    committed: conv2d.ConvBoxes | conv2d.ConvPointers,
    height: int,
    width: int,
    inputs: int,
    outputs: int,
    taps: int,
    stride: int,
    phases: int,
    itemsize: int = 2,
) -> Iterator[conv2d.ConvBoxes | conv2d.ConvPointers]:
    """Tiles of other sizes, other depths of the pipeline and, in fp8, of a step, and sums in more or fewer parts."""
    depths = sorted({committed.depth, 64, 128}) if itemsize == 1 and committed.depth >= 64 else [committed.depth]
    tiles = [(128, 0), (64, 0)] if outputs > 64 else []
    for depth, stages, pixels in itertools.product(depths, (2, 3, 4), (64, 128, 256)):
        steps = taps * -(-inputs // depth)
        for split in (n for n in sorted({1, 2, 4, 8, committed.split}) if n <= max(steps // 4, 1)):
            near = replace(committed, depth=depth, stages=stages, split=split)
            if isinstance(near, conv2d.ConvPointers):
                for columns in dict.fromkeys([near.channels, *(first for first, _ in tiles)]):
                    yield replace(near, pixels=pixels, channels=columns)
                continue
            box = conv2d.box_of(height, width, pixels)
            for channels in dict.fromkeys([near.channels, *tiles]):
                for swapped in {False, near.swapped and channels == near.channels}:
                    yield replace(near, box=box, channels=channels, swapped=swapped)
