"""The command line of the benchmarks: defaults, and errors that name the option."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from bench import options
from bench.record import ROOT
from fastsd.errors import FastsdError


def measuring(**given: Any) -> options.Options:
    return options.parse(benchmark=True, **given)


def test_a_measurement_takes_the_given_values_and_a_check_is_tiny() -> None:
    assert measuring(models="sd15,sdxl", batch="1,4").batches == (1, 4)
    assert options.parse(models="sdxl").models == ("tiny",)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("models", "sd99", "sd99.*sd15"),
        ("peers", "onediff", "onediff.*diffusers"),
        ("dtype", "fp4", "fp4.*bf16"),
        ("budget", "0.5", "--budget.*at least 1"),
        ("budget", "soon", "--budget.*soon"),
        ("batch", "0", "--batch"),
        ("size", "100", "--size.*64"),
        ("model", "no/such/folder", "--model.*no/such/folder"),
    ],
)
def test_an_error_is_one_line_that_names_the_option(name: str, text: str, message: str) -> None:
    with pytest.raises(FastsdError, match=message) as error:
        measuring(**{name: text})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("flags", [["--models", "sd99"], ["--budget", "0.1"]])
def test_pytest_prints_one_line_and_exits_with_2(flags: list[str]) -> None:
    command = [sys.executable, "-m", "pytest", "bench", "--benchmark", *flags]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert process.returncode == 2
    assert f"error: {flags[0]}" in process.stdout + process.stderr
    assert "Traceback" not in process.stdout + process.stderr


def test_on_a_gpu_the_compiled_peer_is_alone_in_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """It gives away cuBLAS workspaces that other graphs may hold."""
    monkeypatch.setattr(options, "resolve_device", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr(options, "resolve_dtype", lambda name, device: torch.float16)
    assert not measuring().compiled_alone and options.COMPILED not in measuring().peers
    assert measuring(peers="diffusers-compiled").compiled_alone
    with pytest.raises(FastsdError, match="--peers: diffusers-compiled .* process of its own"):
        measuring(peers="pytorch,diffusers-compiled")
    monkeypatch.undo()
    assert not measuring(peers="diffusers,diffusers-compiled").compiled_alone  # a CPU has no graphs
