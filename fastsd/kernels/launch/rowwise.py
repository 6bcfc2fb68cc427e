"""Launches of the ops that read rows or elements once: `layernorm`, `geglu`, `advance`, `add_bias_residual`."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from fastsd.kernels.launch.groupnorm_silu import power_of_two


@dataclass(frozen=True)
class RowwiseTile:
    """The settings of an architecture class: elements of a program's tile, and of a warp's share of it."""

    tile: int
    per_warp: int


# Chosen by compiled code (registers, spills, width of the loads) and estimates; none is timed yet.
LAYERNORM: dict[int, RowwiseTile] = {key: RowwiseTile(tile=2048, per_warp=512) for key in (75, 80, 86, 90, 100, 120)}
GEGLU: dict[int, RowwiseTile] = {key: RowwiseTile(tile=2048, per_warp=512) for key in (75, 80, 86, 90, 100, 120)}
ADD_BIAS_RESIDUAL: dict[int, RowwiseTile] = {
    key: RowwiseTile(tile=2048, per_warp=512) for key in (75, 80, 86, 90, 100, 120)
}
# A latent has only 16384 elements: small tiles occupy more multiprocessors.
ADVANCE: dict[int, RowwiseTile] = {key: RowwiseTile(tile=256, per_warp=128) for key in (75, 80, 86, 90, 100, 120)}


@dataclass(frozen=True)
class RowwiseLaunch:
    """The launch of one call: rows and columns of a program's tile, and its warps."""

    block_rows: int
    block_columns: int
    warps: int


@functools.lru_cache(maxsize=1024)
def layernorm(architecture: int, columns: int) -> RowwiseLaunch:
    """The launch for rows of `columns`: whole rows, as many as fill a tile."""
    settings, width = LAYERNORM[architecture], power_of_two(columns)
    return RowwiseLaunch(max(settings.tile // width, 1), width, min(max(settings.tile, width) // settings.per_warp, 16))


@functools.lru_cache(maxsize=1024)
def geglu(architecture: int, columns: int) -> RowwiseLaunch:
    """The launch for results of `columns`: up to 256 at a time, which divide the models' widths (1280, 2560, 5120)."""
    settings, width = GEGLU[architecture], min(power_of_two(columns), 256)
    return RowwiseLaunch(settings.tile // width, width, settings.tile // settings.per_warp)


@functools.lru_cache(maxsize=1024)
def add_bias_residual(architecture: int, columns: int) -> RowwiseLaunch:
    """The launch for rows of `columns`: 64 to 256 at a time, as many as divide the models' widths (320, 640, 1280).

    Narrow rows (the decoder's 3 channels) are as wide as they have to be.
    """
    settings = ADD_BIAS_RESIDUAL[architecture]
    width = next((w for w in (256, 128, 64) if columns % w == 0), min(power_of_two(columns), 256))
    return RowwiseLaunch(settings.tile // width, width, settings.tile // settings.per_warp)


def advance(architecture: int) -> RowwiseLaunch:
    """The launch for any number of elements."""
    settings = ADVANCE[architecture]
    return RowwiseLaunch(1, settings.tile, settings.tile // settings.per_warp)


def row_stride(name: str, x: torch.Tensor) -> int:
    """The stride between the rows of `x` `[..., C]`; 0 if there is only one row.

    Raises:
        ValueError: the rows have no common stride, or the columns are not adjacent; the message begins with `name`.
    """
    stride, rows = 0, 1
    for size, step in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1])):
        if size == 1:
            continue
        if rows == 1:
            stride = step
        elif step != stride * rows:
            stride = -1
            break
        rows *= size
    if stride < 0 or (x.shape[-1] > 1 and x.stride(-1) != 1):
        raise ValueError(f"{name} has strides {list(x.stride())}; it needs one stride between rows, 1 within them")
    return stride
