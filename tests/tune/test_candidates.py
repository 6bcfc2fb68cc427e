"""The candidates for each kind of launch."""

from __future__ import annotations

from typing import Any

import pytest

from fastsd.kernels.launch import flash_attn, groupnorm_silu, rowwise
from fastsd.kernels.launch.tuned import Question
from fastsd.tune.candidates import candidates

QUESTIONS = [
    Question("groupnorm_silu", 90, (4096, 320, 32, 2)),
    Question("groupnorm_silu", 90, (64, 1280, 32, 2)),
    Question("groupnorm_silu", 90, (1, 7, 7, 4)),
    Question("layernorm", 90, (320,)),
    Question("geglu", 90, (1280,)),
    Question("advance", 90, ()),
    Question("flash_attn", 90, (4096, 4096, 8, 40, 2)),
    Question("flash_attn", 90, (4096, 77, 8, 40, 2)),
    Question("flash_attn", 90, (4096, 4096, 1, 512, 2)),
]


def committed_launch(question: Question) -> Any:
    choose = {"groupnorm_silu": groupnorm_silu.choose, "flash_attn": flash_attn.choose}
    return choose.get(question.op, getattr(rowwise, question.op, None))(90, *question.key)  # type: ignore[misc]


@pytest.mark.parametrize("question", QUESTIONS, ids=str)
def test_candidates_are_valid_launches_of_the_same_kind(question: Question) -> None:
    committed = committed_launch(question)
    launches = candidates(question, committed)
    assert launches[0] == committed and len(set(launches)) == len(launches) <= 300
    assert {type(launch) for launch in launches} == {type(committed)}
    assert len(launches) > 3 or isinstance(committed, flash_attn.Wide)
    for launch in launches:
        if isinstance(launch, groupnorm_silu.Launch):
            pixels, _, groups, _ = question.key
            assert groups % launch.groups == 0 and launch.split_pixels < max(pixels, 2)
            assert launch.split_pixels % launch.block_p == 0
        if isinstance(launch, flash_attn.Tile):
            assert sum(launch.parts) >= question.key[3]
