"""`fastsd tune` without a GPU, and the tuning of a kernel in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fastsd.cli import main


def test_without_a_gpu_the_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["tune"]) == 2
    error = capsys.readouterr().err
    assert "needs a CUDA GPU" in error and error.count("\n") == 1


TUNE_LAYERNORM = """
import torch
from fastsd.model import layers
from fastsd.tune import tune
norm = layers.LayerNorm(40)
x = torch.randn(3, 40)
clock = lambda runs: [len(runs) + 0 * len(run()) for run in runs]
((lookup, result),) = tune(lambda: norm(x), clock)
assert (lookup.op, lookup.key) == ("layernorm", (40,)), lookup
assert result.correct == result.candidates > 5, result
from fastsd.kernels.triton import layernorm as layernorm_triton
correct = layernorm_triton.layernorm
def wrong(*args):
    return correct(*args) * 1.01
layernorm_triton.layernorm = wrong
((lookup, result),) = tune(lambda: norm(x), clock)
assert result is None
print("tuned")
"""


def test_the_launches_of_a_kernel_are_searched() -> None:
    """In the interpreter, in a separate process, with a clock that gives equal times."""
    pytest.importorskip("triton", reason="no Triton for this platform")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", TUNE_LAYERNORM]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert process.stdout == "tuned\n", process.stderr
