"""The candidates for each kind of launch."""

from __future__ import annotations

from typing import Any

import pytest

from fastsd.kernels.launch import flash_attn, groupnorm_silu, linear, rowwise
from fastsd.kernels.launch.tuned import Lookup
from fastsd.tune.candidates import candidates

LOOKUPS = [
    Lookup("groupnorm_silu", 90, (4096, 320, 32, 2)),
    Lookup("groupnorm_silu", 90, (64, 1280, 32, 2)),
    Lookup("groupnorm_silu", 90, (1, 7, 7, 4)),
    Lookup("layernorm", 90, (320,)),
    Lookup("geglu", 90, (1280,)),
    Lookup("advance", 90, ()),
    Lookup("flash_attn", 90, (4096, 4096, 8, 40, 2)),
    Lookup("flash_attn", 90, (4096, 77, 8, 40, 2)),
    Lookup("flash_attn", 90, (4096, 4096, 1, 512, 2)),
    Lookup("linear", 90, (2048, 1280, 1280, 0)),
    Lookup("linear", 90, (128, 1280, 5120, 0)),
    Lookup("linear", 90, (8192, 1280, 320, 1)),
]


def committed_launch(lookup: Lookup) -> Any:
    choose = {"groupnorm_silu": groupnorm_silu.choose, "flash_attn": flash_attn.choose, "linear": linear.choose}
    return choose.get(lookup.op, getattr(rowwise, lookup.op, None))(90, *lookup.key)  # type: ignore[misc]


@pytest.mark.parametrize("lookup", LOOKUPS, ids=str)
def test_candidates_are_valid_launches_of_the_same_kind(lookup: Lookup) -> None:
    committed = committed_launch(lookup)
    launches = candidates(lookup, committed)
    assert launches[0] == committed and len(set(launches)) == len(launches) <= 300
    assert {type(launch) for launch in launches} == {type(committed)}
    assert len(launches) > 3 or isinstance(committed, flash_attn.Wide)
    for launch in launches:
        if isinstance(launch, groupnorm_silu.GroupNormLaunch):
            pixels, _, groups, _ = lookup.key
            assert groups % launch.groups == 0 and launch.split_pixels < max(pixels, 2)
            assert launch.split_pixels % launch.block_p == 0
        if isinstance(launch, flash_attn.Tile):
            assert sum(launch.parts) >= lookup.key[3]
        if isinstance(launch, linear.Gemm) and lookup.key[3]:
            assert launch.columns == launch.more and launch.splits == 1
