"""`make gpu` without a GPU: its stages, its error, its summary."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu, options
from tests.support.benchmarks import record_of


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_error_is_one_line(capsys: Any) -> None:
    assert gpu.main([]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith("error: no GPU") and output.err.count("\n") == 1


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf", "soon", "0.1"])
def test_minutes_that_are_no_time_are_refused(minutes: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--rehearse", f"--minutes={minutes}"])
    assert ended.value.code == 2 and "argument --minutes: " in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(("name", "reason"), [("", "it is a folder"), ("file/r.json", "not a directory|file exists")])
def test_results_that_cannot_be_written_end_before_anything_runs(
    name: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(gpu, "run_stages", None)
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--rehearse", "--results", str(tmp_path / name)])
    told = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and re.search(f"argument --results: {tmp_path}.*: ({reason})", told)


def test_a_run_that_measured_nothing_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(gpu, "STAGES", ())
    assert gpu.main(["--rehearse", "--results", str(tmp_path / "r.json")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "nothing was measured, nothing was written"


def test_the_summary_has_at_most_80_lines_and_counts_the_others() -> None:
    records = [
        record_of(name, 0.002, model=f"m{i}", size=None, batch=None)
        for i in range(100)
        for name in ("fastsd", "diffusers")
    ]
    text = gpu.summary([(True, "tests: passed")], records)
    assert len(text) == gpu.MAX_LINES == 80
    assert "tests: passed" in text and text[-1] == f"... and {3 + 100 - 79} more lines, in the file"
    few = [record_of(name, median, size=None, batch=None) for name, median in (("diffusers", 0.004), ("fastsd", 0.002))]
    text = gpu.summary([(False, "tests: FAILED (3 s)")], few)
    assert "tests: FAILED (3 s)" in text and text[-1] == "step sd15 bf16: 2 ms; diffusers 4 ms (2.00x)"


def test_a_line_of_the_summary_has_rate_memory_and_failures() -> None:
    labels: dict[str, Any] = {"benchmark": "kernel", "model": "linear-1x2x3", "size": None, "batch": None}
    own = record_of("fastsd", 1e-5, **labels, floor=5e-6, flops=1e9, bytes=1.0, binds="flops")
    failed = record_of("SDPA", None, **labels, problem="failed: RuntimeError: " + "no kernel " * 30)
    line = gpu.summary([], [own, failed])[-1]
    assert line.startswith("linear-1x2x3 bf16: 10 µs, 100 TFLOP/s, 50.0% of the limit; SDPA: failed: RuntimeError: no")
    assert len(line) < 160
    cold = record_of("fastsd, empty kernel cache", 1e-5, **labels | {"benchmark": "cold"}, peak={"driver": 2**31})
    assert gpu.summary([], [cold])[-1].endswith("10 µs, peak driver 2.00 GiB")
    wrong = record_of("fastsd", None, **labels)
    assert gpu.summary([], [wrong])[-1].endswith(": correctness check failed: relative error 0.5")


FAULTY_TESTS = """
import os, sys, time
import pytest

@pytest.fixture(autouse=True)
def log(request):
    with open(__file__ + ".log", "a") as file:
        file.write(request.node.name.removeprefix("test_") + " ")

def test_first(): pass
def test_hangs(): time.sleep(1000)
def test_fails(): assert False
def test_dies(): os.abort()
def test_leaves(): os._exit(0)
def test_loses_the_gpu(): sys.modules["torch"] = LostGpu
def test_last(): pass

class LostGpu:
    class cuda:
        is_initialized = staticmethod(lambda: True)
        @staticmethod
        def synchronize(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
"""


@pytest.mark.heavy
def test_a_test_that_hangs_dies_or_loses_the_gpu_does_not_stop_the_others(tmp_path: Path, monkeypatch: Any) -> None:
    """Each is reported, and every test runs exactly once."""
    file = tmp_path / "test_faulty.py"
    file.write_text(FAULTY_TESTS)
    monkeypatch.setattr(gpu, "MIN_BUDGET", 1.0)
    began = time.monotonic()
    stage = gpu.GpuStage("faulty", (str(file),), 1.0, timeout=4.0)
    passed, line = gpu.run_stage(stage, tmp_path / "r.json", began + 100)
    assert time.monotonic() - began < 40
    assert not passed and line.startswith(
        "faulty: FAILED; killed after 4 s: test_faulty.py::test_hangs; died with exit code -6: "
    )
    assert "exit code 0: test_faulty.py::test_leaves; the GPU was lost: test_faulty.py::test_loses_the_gpu (" in line
    ran = (tmp_path / "test_faulty.py.log").read_text().split()
    assert ran == ["first", "hangs", "fails", "dies", "leaves", "loses_the_gpu", "last"]


def test_a_stage_is_stopped_at_its_end(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(gpu, "MIN_BUDGET", 1.0)
    file = tmp_path / "test_slow.py"
    file.write_text("import time\ndef test_slow(): time.sleep(1000)\n")
    began = time.monotonic()
    passed, line = gpu.run_stage(gpu.GpuStage("slow", (str(file),), share=1.0), tmp_path / "r.json", began + 4)
    assert passed and gpu.OUT_OF_TIME in line and 3 < time.monotonic() - began < 8


def test_a_stage_that_cannot_run_does_not_stop_the_others(tmp_path: Path, monkeypatch: Any) -> None:
    def run_stage(stage: gpu.GpuStage, path: Path, end: float, sm: int) -> tuple[bool, str]:
        if stage.title == "bad":
            raise OSError("no more processes")
        if stage.title == "interrupted":
            raise KeyboardInterrupt
        return True, f"{stage.title}: passed"

    monkeypatch.setattr(gpu, "run_stage", run_stage)
    stages = tuple(gpu.GpuStage(title, (), 0.5) for title in ("bad", "good", "interrupted", "never"))
    outcomes = gpu.run_stages(stages, tmp_path / "r.json", time.monotonic() + 100)
    assert [passed for passed, _ in outcomes] == [False, True, False]
    assert "no more processes" in outcomes[0][1] and "interrupted" in outcomes[2][1]


def test_a_missing_package_and_a_lack_of_time_are_reported(tmp_path: Path) -> None:
    stage = gpu.GpuStage("peer", ("bench",), 1.0, package="no_such_package")
    missing, late = (gpu.run_stage(stage, tmp_path, time.monotonic() + seconds) for seconds in (100, 0.5))
    assert missing == (True, "peer: not run, no_such_package is not installed")
    assert late == (True, "peer: not run, the time was spent")


def test_a_damaged_result_file_does_not_prevent_the_summary(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu.record, "environment", lambda device: {"device": "a played GPU", "versions": {}})
    monkeypatch.setattr(gpu, "STAGES", ())
    (tmp_path / "r.json").write_text("{")
    assert gpu.main(["--results", str(tmp_path / "r.json")]) == 0
    output = capsys.readouterr()
    assert "device: a played GPU" in output.out and "== summary" in output.out and "not a result file" in output.err


def test_a_module_is_run_with_its_share_of_the_time_and_told_when_it_fails(tmp_path: Path) -> None:
    stage = gpu.GpuStage("compile", ("--sm", "{sm}"), 1.0, module="bench.warm")
    assert stage.command(33.4, tmp_path, 89) == [sys.executable, "-m", "bench.warm", "--sm", "89"]
    failing = gpu.GpuStage("this", ("no", "such", "argument"), 1.0, module="json.tool")
    passed, line = gpu.run_stage(failing, tmp_path / "r.json", time.monotonic() + 60)
    assert not passed and line.startswith("this: FAILED (")
    hanging = gpu.GpuStage("code", ("-c", "import time; time.sleep(100)"), 1.0, timeout=1.0, module="timeit")
    passed, line = gpu.run_stage(hanging, tmp_path / "r.json", time.monotonic() + 60)
    assert not passed and line.startswith("code: killed after 1 s: timeit (")


def test_a_module_that_excluded_a_kernel_is_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that faulted the GPU cannot go on; what it excluded is in the table."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    counter = "import pathlib, sys; p = pathlib.Path(sys.argv[1]); n = len(p.read_text()) if p.exists() else 0\n"
    (tmp_path / "faulty.py").write_text(counter + "p.write_text('x' * (n + 1)); sys.exit(75 if n < 2 else 0)\n")
    stage = gpu.GpuStage("ways", (str(tmp_path / "count"),), 1.0, module="faulty")
    passed, line = gpu.run_stage(stage, tmp_path / "r.json", time.monotonic() + 60)
    assert (tmp_path / "count").read_text() == "xxx"
    assert not passed and line.startswith(f"ways: {gpu.FAULTED}; {gpu.FAULTED} (")  # told, and the stage went on


def test_the_plan_is_in_order_of_importance_and_keeps_the_compiled_peer_apart() -> None:
    """First that it works, then the choice of each op's way, then figures; torch.compile in processes of its own."""
    titles = [stage.title for stage in gpu.STAGES]
    assert [title.startswith("preflight") for title in titles[:3]] == [True, True, False]
    for model in ("SD1.5", "SDXL"):
        figures = [i for i, title in enumerate(titles) if title.startswith(model) and "ways" not in title]
        assert titles.index(f"{model}: the ways of each op") < min(figures)
        assert titles[min(figures)] == f"{model}: a step as users get it"
    for stage in gpu.STAGES:
        peers = [stage.arguments[i + 1] for i, part in enumerate(stage.arguments) if part == "--peers"]
        assert not any("compiled" in each for each in peers) or peers == [options.COMPILED]


@pytest.mark.heavy
def test_the_whole_plan_runs_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """Each kind of stage once, in its own process, with the flags that it has on a GPU; the results are in the file.

    Of the stages that a CPU only collects, one: the test below knows their files.
    """
    path = tmp_path / "r.json"
    kept = [stage for stage in gpu.STAGES if stage.rehearsal != gpu.COLLECTED or "image" in stage.arguments[-1]]
    monkeypatch.setattr(gpu, "STAGES", tuple(kept))
    assert gpu.main(["--rehearse", "--minutes", "8", "--results", str(path)]) == 0
    out = capfd.readouterr().out
    assert "== preflight\n" in out and f"torch: {torch.__version__}" in out
    lines = out[out.index("== summary") :].splitlines()
    outcomes = [line for line in lines if line.endswith(" s)")]
    assert len(outcomes) == len(gpu.rehearsed(gpu.STAGES)) and all(": passed (" in line for line in outcomes)
    measured = {row["benchmark"]: row for row in gpu.record.read(path)["records"] if row["candidate"] == "fastsd"}
    assert measured.keys() == {"denoise", "step", "decode", "image", "kernel", "cold", "turbo"}
    assert all(row["seconds"] for row in measured.values()) and measured["step"]["kinds"]


def test_every_stage_names_existing_files_tests_and_options() -> None:
    for stage in gpu.STAGES:
        assert 0 < stage.share <= 1
        if stage.module:
            source = (gpu.record.ROOT / stage.module.replace(".", "/")).with_suffix(".py").read_text()
            given = [*stage.arguments, *(stage.rehearsal or ())]
            assert all(f'"{part}"' in source for part in given if part.startswith("--")), stage
            continue
        targets = [part for part in stage.arguments if part.startswith(("tests", "bench/"))]
        for target in targets:
            path, _, test = target.partition("::")
            assert (gpu.record.ROOT / path).exists(), target
            assert not test or f"def {test}(" in (gpu.record.ROOT / path).read_text(), target
        if targets[0].startswith("bench/"):
            flags = stage.arguments[1:]
            values = {flag.removeprefix("--"): value for flag, value in zip(flags, flags[1:]) if flag.startswith("--")}
            assert values.keys() <= options.HELP.keys()
            assert options.parse(benchmark=True, **values).measuring
