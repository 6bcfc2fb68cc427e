"""`make gpu` where there is none, and its summary."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu
from bench.session import check_options

NOTHING: dict[str, Any] = dict.fromkeys(
    ["models", "batch", "size", "steps", "dtype", "peers", "budget", "model", "results", "profile"]
)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_one_line_and_exits_with_2(capsys: Any) -> None:
    assert gpu.main([]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: no GPU") and said.err.count("\n") == 1


def test_the_summary_is_at_most_80_lines_and_says_what_it_left_out() -> None:
    def one(i: int, candidate: str, median: float) -> dict[str, Any]:
        seconds = {"median": median, "low": median, "high": median, "rounds": 3}
        return {"contest": "step", "model": f"m{i}", "dtype": "fp16", "candidate": candidate, "seconds": seconds}

    records = [one(i, name, 0.002) for i in range(100) for name in ("fastsd", "diffusers")]
    text = gpu.summary([(True, "tests: green")], records)
    assert len(text) == gpu.MOST_LINES == 80
    assert "tests: green" in text and "more lines" in text[-1]
    few = gpu.summary([(False, "tests: RED (3 s)")], [one(0, "diffusers", 0.004), one(0, "fastsd", 0.002)])
    assert "tests: RED (3 s)" in few and few[-1] == "step m0 fp16: 2 ms; diffusers 4 ms (2.00x)"


def test_a_line_of_the_summary_has_rates_memory_and_what_failed() -> None:
    base = {"contest": "kernel", "model": "linear-1x2x3", "dtype": "fp16"}
    seconds = {"median": 1e-5, "low": 1e-5, "high": 1e-5, "rounds": 3}
    own = base | {
        "candidate": "fastsd",
        "seconds": seconds,
        "floor": 5e-6,
        "flops": 1e9,
        "bytes": 1.0,
        "binds": "flops",
    }
    red = base | {"candidate": "SDPA", "seconds": None, "problem": "failed: RuntimeError: " + "no kernel " * 30}
    line = gpu.summary([], [own, red])[-1]
    assert line.startswith("linear-1x2x3 fp16: 10 µs, 100 TFLOP/s, 50.0% of the limit; SDPA: failed: RuntimeError: no")
    assert len(line) < 160
    cold = base | {"contest": "cold", "candidate": "fastsd, empty kernel cache", "seconds": seconds}
    assert gpu.summary([], [cold | {"peak": {"driver": 2**31}}])[-1].endswith("10 µs, peak driver 2.00 GiB")
    assert gpu.summary([], [base | {"candidate": "fastsd", "problem": "red gate: x"}])[-1].endswith(": red gate: x")


FAULTY = """
import os, sys, time
import pytest

@pytest.fixture(autouse=True)
def noted(request):
    with open(__file__ + ".ran", "a") as file:
        file.write(request.node.name.removeprefix("test_") + " ")

def test_first(): pass
def test_hangs(): time.sleep(1000)
def test_fails(): assert False
def test_dies(): os.abort()
def test_leaves(): os._exit(0)
def test_loses_the_gpu(): sys.modules["torch"] = LOST
def test_last(): pass

class LOST:
    class cuda:
        is_initialized = staticmethod(lambda: True)
        @staticmethod
        def synchronize(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
"""


def test_what_hangs_or_dies_or_loses_the_gpu_takes_nothing_with_it(tmp_path: Path, monkeypatch: Any) -> None:
    """Each is killed or left behind, and said; what stands after it is run all the same, once."""
    file = tmp_path / "test_faulty.py"
    file.write_text(FAULTY)
    monkeypatch.setattr(gpu, "LEAST_BUDGET", 1.0)
    began = time.monotonic()
    ok, said = gpu.run(gpu.Stage("faulty", (str(file),), 1.0, patience=4.0), tmp_path / "r.json", began + 100)
    assert time.monotonic() - began < 40
    assert not ok and said.startswith(
        "faulty: RED; killed after 4 s: test_faulty.py::test_hangs; died with exit code -6: "
    )
    assert "exit code 0: test_faulty.py::test_leaves; the GPU was lost: test_faulty.py::test_loses_the_gpu (" in said
    ran = (tmp_path / "test_faulty.py.ran").read_text().split()
    assert ran == ["first", "hangs", "fails", "dies", "leaves", "loses_the_gpu", "last"]


def test_a_stage_that_would_go_on_is_stopped_at_its_end(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(gpu, "LEAST_BUDGET", 1.0)
    file = tmp_path / "test_slow.py"
    file.write_text("import time\ndef test_slow(): time.sleep(1000)\n")
    began = time.monotonic()
    ok, said = gpu.run(gpu.Stage("slow", (str(file),), share=1.0), tmp_path / "r.json", began + 4)
    assert ok and gpu.OUT_OF_TIME in said and 3 < time.monotonic() - began < 8


def test_one_stage_that_cannot_be_run_leaves_the_others(tmp_path: Path, monkeypatch: Any) -> None:
    def run(stage: gpu.Stage, path: Path, end: float) -> tuple[bool, str]:
        if stage.title == "bad":
            raise OSError("no more processes")
        if stage.title == "interrupted":
            raise KeyboardInterrupt
        return True, f"{stage.title}: green"

    monkeypatch.setattr(gpu, "run", run)
    stages = tuple(gpu.Stage(title, (), 0.5) for title in ("bad", "good", "interrupted", "never"))
    found = gpu.everything(stages, tmp_path / "r.json", time.monotonic() + 100)
    assert [ok for ok, _ in found] == [False, True, False]
    assert "no more processes" in found[0][1] and "interrupted" in found[2][1]


def test_what_is_not_installed_or_has_no_time_is_said(tmp_path: Path) -> None:
    stage = gpu.Stage("peer", ("bench",), 1.0, package="no_such_package")
    assert gpu.run(stage, tmp_path, time.monotonic() + 100) == (True, "peer: not run, no_such_package is not installed")
    assert gpu.run(stage, tmp_path, time.monotonic() + 5) == (True, "peer: not run, the time was spent")


def test_a_damaged_result_file_does_not_take_the_summary(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "STAGES", ())
    (tmp_path / "r.json").write_text("{")
    assert gpu.main(["--results", str(tmp_path / "r.json")]) == 0
    said = capsys.readouterr()
    assert "== summary" in said.out and "not a result file" in said.err


def test_every_stage_fits_and_names_files_that_exist() -> None:
    for stage in gpu.STAGES:
        assert 0 < stage.share <= 1
        target = next(part for part in stage.arguments if part.startswith(("tests", "bench/")))
        assert (gpu.record.ROOT / target).exists()
        if target.startswith("bench/"):
            flags = stage.arguments[1:]
            named = {flag.removeprefix("--"): value for flag, value in zip(flags, flags[1:]) if flag.startswith("--")}
            assert named.keys() <= NOTHING.keys()
            assert check_options(NOTHING | named | {"benchmark": True}).measuring
