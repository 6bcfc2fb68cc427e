"""`make gpu` where there is none, and its summary."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_one_line_and_exits_with_2(capsys: Any) -> None:
    assert gpu.main([]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: no GPU") and said.err.count("\n") == 1


def test_the_summary_is_at_most_80_lines_and_says_what_it_left_out() -> None:
    def one(i: int, candidate: str, median: float) -> dict[str, Any]:
        seconds = {"median": median, "low": median, "high": median, "rounds": 3}
        return {"contest": "step", "model": f"m{i}", "dtype": "fp16", "candidate": candidate, "seconds": seconds}

    records = [one(i, name, 0.002) for i in range(50) for name in ("fastsd", "diffusers")]
    text = gpu.summary([(True, "tests: green")], records)
    assert len(text) == gpu.MOST_LINES == 80
    assert "tests: green" in text and "more lines" in text[-1]
    few = gpu.summary([(False, "tests: RED (3 s)")], [one(0, "fastsd", 0.002), one(0, "diffusers", 0.004)])
    assert "tests: RED (3 s)" in few and any("diffusers" in line and "2.00x" in line for line in few)


def test_a_kernel_is_one_line_with_the_best_of_pytorchs() -> None:
    seconds = {"low": 1e-5, "high": 1e-5, "rounds": 3}
    base = {"contest": "kernel", "model": "linear-1x2x3", "dtype": "fp16"}
    records = [base | {"candidate": name, "seconds": seconds | {"median": t}}
               for name, t in (("fastsd", 1e-5), ("slow", 5e-5), ("F.linear", 2e-5))]  # fmt: skip
    (line,) = [line for line in gpu.summary([], records) if "linear-1x2x3" in line]
    assert "10 µs" in line and "F.linear 20.0 µs" in line and "slow" not in line


def test_every_stage_fits_and_names_files_that_exist() -> None:
    for stage in gpu.STAGES:
        assert 0 < stage.share <= 1
        target = next(part for part in stage.arguments if part.startswith(("tests", "bench/")))
        assert (gpu.record.ROOT / target).exists()
