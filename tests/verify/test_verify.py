"""The command `fastsd verify`: its table, its JSON, its exit codes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fastsd.cli import main
from fastsd.kernels import flash_attn
from fastsd.kernels.cpu import choices
from fastsd.verify import interpreted


def flags(*extra: str) -> list[str]:
    return ["verify", "--device", "cpu", "--dtype", "fp32", "--steps", "1", *extra]


@pytest.fixture
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the interpreter; test_interpreted.py covers it."""
    monkeypatch.setattr(interpreted, "check_in_interpreter", list)


@pytest.mark.heavy
def test_the_command_prints_a_table(no_interpreter: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags()) == 0
    output = capsys.readouterr().out
    assert "model: digits" in output and "FAIL" not in output and " 0 failed" in output
    assert "pass  conv2d" in output and "PSNR" in output


@pytest.mark.heavy
def test_the_command_prints_json_and_fails(
    no_interpreter: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    correct: Any = flash_attn._sdpa
    monkeypatch.setattr(flash_attn, "_image_fp32", lambda q, k, v: correct(q[None], k[None], v[None])[0] * 1.001)
    with choices.forced("flash_attn", "products"):
        assert main(flags("--json")) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] is False and report["dtype"] == "fp32"
    assert {row["level"] for row in report["rows"]} == {"op", "layer", "module", "image", "graphs"}
    assert "flash_attn" in {row["name"] for row in report["rows"] if row["passed"] is False}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--model", "nothing-here"], "nothing-here"),
        (["--steps", "0"], "--steps is 0"),
        (["--device", "cuda:99"], "CUDA devices"),
    ],
)
def test_an_error_is_one_line(extra: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags(*extra)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
