"""Launches of the ops that go over rows or elements once: `layernorm`, `geglu`, `advance`."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from fastsd.kernels.launch.groupnorm_silu import power_of_two
from fastsd.kernels.launch.tuned import tunable


@dataclass(frozen=True)
class RowwiseTile:
    """What an architecture class gets: elements of a program's tile and of one warp's share of it."""

    tile: int
    per_warp: int


# Chosen by compiled code (registers, spills, width of the loads) and estimates; no row has been timed yet.
LAYERNORM: dict[int, RowwiseTile] = {key: RowwiseTile(tile=2048, per_warp=512) for key in (75, 80, 86, 90, 100, 120)}
GEGLU: dict[int, RowwiseTile] = {key: RowwiseTile(tile=2048, per_warp=512) for key in (75, 80, 86, 90, 100, 120)}
# A latent has 16384 numbers: small tiles keep more multiprocessors busy.
ADVANCE: dict[int, RowwiseTile] = {key: RowwiseTile(tile=256, per_warp=128) for key in (75, 80, 86, 90, 100, 120)}


@dataclass(frozen=True)
class RowwiseLaunch:
    """One call's launch: rows and columns of a program's tile, and its warps."""

    block_rows: int
    block_columns: int
    warps: int


@tunable("layernorm", RowwiseLaunch)
@functools.lru_cache(maxsize=1024)
def layernorm(architecture: int, columns: int) -> RowwiseLaunch:
    """Whole rows; as many of them as fill a tile."""
    row, width = LAYERNORM[architecture], power_of_two(columns)
    return RowwiseLaunch(max(row.tile // width, 1), width, min(max(row.tile, width) // row.per_warp, 16))


@tunable("geglu", RowwiseLaunch)
@functools.lru_cache(maxsize=1024)
def geglu(architecture: int, columns: int) -> RowwiseLaunch:
    """Up to 256 columns: widths of the models here (1280, 2560, 5120) are multiples of that."""
    row, width = GEGLU[architecture], min(power_of_two(columns), 256)
    return RowwiseLaunch(row.tile // width, width, row.tile // row.per_warp)


@tunable("advance", RowwiseLaunch)
def advance(architecture: int) -> RowwiseLaunch:
    """A run of elements."""
    row = ADVANCE[architecture]
    return RowwiseLaunch(1, row.tile, row.tile // row.per_warp)


def row_stride(name: str, x: torch.Tensor) -> int:
    """The one stride between the rows of `x` `[..., C]`, 0 if there is only one row.

    Raises:
        ValueError: `name` has rows that no one stride reaches, or columns apart from each other.
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
        raise ValueError(f"{name} has strides {list(x.stride())}; it needs one stride between rows, and 1 within them")
    return stride
