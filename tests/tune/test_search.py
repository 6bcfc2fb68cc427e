"""The search, with a clock that is made up: a launch's time is its own number."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from fastsd.cli import main
from fastsd.kernels.launch import flash_attn, groupnorm_silu
from fastsd.kernels.launch import rowwise as rows
from fastsd.kernels.launch.tuned import Question
from fastsd.tune.candidates import candidates
from fastsd.tune.search import FINALISTS, search


class FakeClock:
    """Seconds are what a run returns; keeps what was timed together."""

    def __init__(self) -> None:
        self.rounds: list[list[float]] = []

    def __call__(self, runs: Sequence[Callable[[], Any]]) -> list[float]:
        self.rounds.append([run() for run in runs])
        return self.rounds[-1]


def found(launches: Sequence[float], correct: Callable[[float], bool] = lambda _: True) -> Any:
    return search(launches, correct, lambda launch: launch, FakeClock())


def test_the_fastest_right_one_wins() -> None:
    result = found([10.0, 3.0, 2.0, 5.0], lambda launch: launch != 2.0)
    assert (result.launch, result.seconds, result.committed_seconds) == (3.0, 3.0, 10.0)
    assert (result.right, result.tried) == (3, 4)


def test_a_hair_is_not_enough() -> None:
    assert found([10.0, 9.8]).launch == 10.0
    assert found([10.0, 9.6]).launch == 9.6


def test_alone_the_committed_one_stays() -> None:
    assert found([10.0]).launch == 10.0


def test_nothing_is_found_where_the_committed_one_is_wrong() -> None:
    assert found([10.0, 1.0], lambda launch: launch != 10.0) is None


def test_what_does_not_launch_drops_out_and_a_dead_gpu_ends_it() -> None:
    def failing(message: str) -> Callable[[float], bool]:
        def correct(launch: float) -> bool:
            if launch == 1.0:
                raise RuntimeError(message)
            return True

        return correct

    assert found([10.0, 1.0, 5.0], failing("out of resource: shared memory")).launch == 5.0
    with pytest.raises(RuntimeError, match="illegal"):
        found([10.0, 1.0], failing("CUDA error: an illegal memory access was encountered"))


def test_a_wrong_launch_is_never_timed_and_finalists_meet_the_committed_one() -> None:
    clock = FakeClock()
    search([10.0, *(float(n) for n in range(1, 9))], lambda launch: launch != 1.0, lambda launch: launch, clock)
    assert all(1.0 not in times for times in clock.rounds)
    assert clock.rounds[-1] == [10.0, *(float(n) for n in range(2, 2 + FINALISTS))]


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


def committed(question: Question) -> Any:
    choose = {"groupnorm_silu": groupnorm_silu.choose, "flash_attn": flash_attn.choose}
    return choose.get(question.op, getattr(rows, question.op, None))(90, *question.key)  # type: ignore[misc]


@pytest.mark.parametrize("question", QUESTIONS, ids=str)
def test_candidates_are_launches_of_the_same_kind(question: Question) -> None:
    first = committed(question)
    listed = candidates(question, first)
    assert listed[0] == first and len(set(listed)) == len(listed) <= 300
    assert {type(launch) for launch in listed} == {type(first)}
    assert len(listed) > 3 or isinstance(first, flash_attn.Wide)
    for launch in listed:
        if isinstance(launch, groupnorm_silu.Launch):
            pixels, _, groups, _ = question.key
            assert groups % launch.groups == 0 and launch.split_pixels < max(pixels, 2)
            assert launch.split_pixels % launch.block_p == 0
        if isinstance(launch, flash_attn.Tile):
            assert sum(launch.parts) >= question.key[3]


def test_without_a_gpu_it_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["tune"]) == 2
    error = capsys.readouterr().err
    assert "needs a CUDA GPU" in error and error.count("\n") == 1


KERNELS = """
import torch
from fastsd.model import layers
from fastsd.tune import tune
norm = layers.LayerNorm(40)
x = torch.randn(3, 40)
clock = lambda runs: [len(runs) + 0 * len(run()) for run in runs]
((question, found),) = tune(lambda: norm(x), clock)
assert (question.op, question.key) == ("layernorm", (40,)), question
assert found.right == found.tried > 5, found
from fastsd.kernels.triton import layernorm as layernorm_triton
right = layernorm_triton.layernorm
def wrong(*args):
    return right(*args) * 1.01
layernorm_triton.layernorm = wrong
((question, found),) = tune(lambda: norm(x), clock)
assert found is None
print("tuned")
"""


def test_kernels_are_tuned_by_what_they_ask() -> None:
    """In the interpreter, in a process of its own, with a clock that likes all launches alike."""
    pytest.importorskip("triton", reason="no Triton for this platform")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", KERNELS], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "tuned\n", done.stderr
