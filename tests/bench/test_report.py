"""The table and the charts show what the files hold: no figure where a gate was red, ratios of medians."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from bench import record, report

LABELS = {"contest": "step", "model": "sd15", "size": 512, "batch": 1, "dtype": "bf16"}
GATE = {"passed": True, "max": 0.1, "relative": 0.01, "psnr": 40.0}


def timed(candidate: str, median: float, **more: Any) -> dict[str, Any]:
    seconds = {"median": median, "low": median, "high": median, "rounds": 3}
    return LABELS | {"candidate": candidate, "gate": GATE, "seconds": seconds, **more}


DATA: dict[str, Any] = {
    "format": 1,
    "environment": {"device": "a processor", "cores": 2, "threads": 2, "versions": {"torch": "2.13", "fastsd": "0.1"},
                    "commit": "abc", "date": "2026-01-02T03:04:05"},
    "records": [
        timed("fastsd", 2.0, floor=0.5, by_kind={"conv": 0.3, "linear": 0.2}, kinds={"conv": 1.5, "other": 0.5}),
        timed("fastsd", 5.0, floor=1.9, batch=4),
        timed("diffusers", 3.0),
        LABELS | {"candidate": "other", "gate": None, "seconds": None, "problem": "red gate: relative error 0.5"},
        timed("fastsd", 9.0, contest="cold", steps=4, split={"import": 3.0, "weights": 6.0}, peak={"resident": 2**31}),
    ],
}  # fmt: skip


def test_the_table() -> None:
    text = report.table(DATA)
    row = next(line for line in text.splitlines() if "guided step, sd15 512², bf16 |" in line)
    assert "**2 s**" in row and "3 s (1.50×)" in row and "red gate" in row and row.endswith("| 25% |")
    assert "**9 s**, 2.0 GiB" in text
    assert "a processor, 2 threads; torch 2.13; commit abc, 2026-01-02" in text


def test_the_kernels_are_a_table_of_their_own(tmp_path: Path) -> None:
    assert report.kernel_table(DATA) == ""
    base = LABELS | {"contest": "kernel", "model": "linear-1x2x3", "size": None, "batch": None, "gate": GATE}
    reached = {"floor": 0.5, "flops": 4e12, "bytes": 6e9, "binds": "flops"}
    seconds = {"median": 2.0, "low": 2.0, "high": 2.0, "rounds": 3}
    records = [base | reached | {"candidate": "fastsd", "seconds": seconds},
               base | reached | {"candidate": "F.linear", "seconds": seconds | {"median": 4.0}},
               base | {"candidate": "other", "seconds": None, "problem": "red gate: relative error 1"}]  # fmt: skip
    text = report.kernel_table(DATA | {"records": records})
    assert "| linear-1x2x3, bf16 | fastsd | 2 s | 2 TFLOP/s | 25% |" in text
    assert "| F.linear | 4 s | 1 TFLOP/s | 12% |" in text and "| other | red gate |" in text
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- kernels -->\nstale\n<!-- /kernels -->\nb\n")
    assert report.put(page, report.KERNELS, text) and "stale" not in page.read_text() and text in page.read_text()


def test_the_readme_keeps_all_but_what_is_between_the_marks(tmp_path: Path, capsys: Any) -> None:
    readme, file = tmp_path / "README.md", tmp_path / "cpu" / "2026-01-02-abc.json"
    elsewhere = ["--charts", str(tmp_path / "charts"), "--kernels", str(readme)]
    record.write(copy.deepcopy(DATA), file)
    readme.write_text("before\n<!-- speed -->\nstale\n<!-- /speed -->\nafter\n")
    assert report.main([str(file), "--readme", str(readme), *elsewhere]) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "stale" not in text and "**2 s**" in text
    readme.write_text("no marks")
    assert report.main([str(file), "--readme", str(readme), *elsewhere]) == 0
    assert readme.read_text() == "no marks" and "<!-- speed -->" in capsys.readouterr().err


def test_charts(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from bench.charts import draw

    made = draw(DATA, tmp_path, "cpu")
    assert [path.name for path in made] == [
        "speed-cpu.png",
        "parts-cpu.png",
        "batches-cpu.png",
        "memory-cpu.png",
        "first-cpu.png",
    ]
    nothing = DATA | {"records": [DATA["records"][2]]}
    assert draw(nothing, tmp_path / "none", "cpu") == []


def test_a_file_that_is_none_is_one_line_and_exit_code_2(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "x.json").write_text("{}")
    assert report.main([str(tmp_path / "x.json")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
