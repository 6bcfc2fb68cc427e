"""Tables and charts show the content of the files: ratios of medians, and no time after a failed correctness check."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from bench import figures, record, report
from tests.support.benchmarks import record_of

DATA: dict[str, Any] = {
    "format": 1,
    "environment": {"device": "a processor", "cores": 2, "threads": 2, "versions": {"torch": "2.13", "fastsd": "0.1"},
                    "commit": "abc", "date": "2026-01-02T03:04:05"},
    "records": [
        record_of("fastsd", 2.0, floor=0.5, by_kind={"conv": 0.3, "linear": 0.2}, kinds={"conv": 1.5, "other": 0.5}),
        record_of("fastsd", 5.0, floor=1.9, batch=4),
        record_of("diffusers", 3.0),
        record_of("other", None),
        record_of("fastsd", 9.0, benchmark="cold", steps=4, split={"import": 3.0, "weights": 6.0},
                  peak={"resident": 2**31}),
    ],
}  # fmt: skip


def test_the_table() -> None:
    text = report.table(DATA)
    row = next(line for line in text.splitlines() if "guided step, sd15 512², bf16 |" in line)
    assert "**2 s**" in row and "3 s (1.50×)" in row and row.endswith("| 25% |")
    assert "| correctness check failed |" in row
    assert "**9 s**, 2.0 GiB" in text
    assert "a processor, 2 threads; torch 2.13; commit abc, 2026-01-02" in text


def test_the_table_of_kernels(tmp_path: Path) -> None:
    assert report.kernel_table(DATA) == ""
    labels: dict[str, Any] = {"benchmark": "kernel", "model": "linear-1x2x3", "size": None, "batch": None}
    work: dict[str, Any] = {"floor": 0.5, "flops": 4e12, "bytes": 6e9, "binds": "flops"}
    records = [
        record_of("fastsd", 2.0, **labels, **work),
        record_of("F.linear", 4.0, **labels, **work),
        record_of("other", None, **labels),
    ]
    text = report.kernel_table(DATA | {"records": records})
    assert "| linear-1x2x3, bf16 | fastsd | 2 s | 2 TFLOP/s | 25% |" in text
    assert "| F.linear | 4 s | 1 TFLOP/s | 12% |" in text and "| other | correctness check failed |" in text
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- kernels -->\nstale\n<!-- /kernels -->\nb\n")
    assert report.replace_marked(page, report.KERNELS, text)
    assert page.read_text() == f"a\n<!-- kernels -->\n{text}\n<!-- /kernels -->\nb\n"


def test_the_readme_changes_only_between_the_marks(tmp_path: Path, capsys: Any) -> None:
    readme, file = tmp_path / "README.md", tmp_path / "cpu" / "2026-01-02-abc.json"
    flags = ["--readme", str(readme), "--charts", str(tmp_path / "charts"), "--kernels", str(readme)]
    record.write(copy.deepcopy(DATA), file)
    readme.write_text("before\n<!-- speed -->\nstale\n<!-- /speed -->\nafter\n")
    assert report.main([str(file), *flags]) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "stale" not in text and "**2 s**" in text
    readme.write_text("no marks")
    assert report.main([str(file), *flags]) == 0
    assert readme.read_text() == "no marks" and "<!-- speed -->" in capsys.readouterr().err


def test_every_chart_with_data_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from bench.charts import write_charts

    written = write_charts(DATA, tmp_path, "cpu")
    assert [path.name for path in written] == [f"{name}-cpu.png" for name in
                                               ("speed", "parts", "batches", "memory", "first")]  # fmt: skip
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
    without_fastsd = DATA | {"records": [DATA["records"][2]]}
    assert write_charts(without_fastsd, tmp_path / "none", "cpu") == []


def test_charts_show_the_values_of_the_records() -> None:
    pytest.importorskip("matplotlib")
    from bench import charts

    speed = charts._speed(DATA).axes[0]
    assert [label.get_text() for label in speed.get_yticklabels()] == ["fastsd", "diffusers", "floor"]
    assert [bar.get_width() for bar in speed.patches] == [2.0, 3.0, 0.5]
    parts = charts._parts(DATA).axes[0]
    measured = {group.get_label(): group.patches[0].get_width() for group in parts.containers}
    floor = {group.get_label(): group.patches[1].get_width() for group in parts.containers}
    assert measured == pytest.approx({"conv": 0.75, "linear": 0, "attention": 0, "norm": 0, "other": 0.25})
    assert floor == pytest.approx({"conv": 0.15, "linear": 0.1, "attention": 0, "norm": 0, "other": 0})
    batches = {line.get_label(): line.get_ydata() for line in charts._batches(DATA).axes[0].lines}
    assert list(batches["fastsd"]) == [1 / 2.0, 4 / 5.0] and list(batches["floor"]) == [1 / 0.5, 4 / 1.9]
    assert [text.get_text() for text in charts._memory(DATA).axes[0].texts] == ["2.00 GiB"]
    assert [text.get_text() for text in charts._first(DATA).axes[0].texts] == [" 9.0 s"]


def test_a_wrong_file_is_an_error(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "x.json").write_text("{}")
    assert report.main([str(tmp_path / "x.json")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_the_reason_for_a_missing_time_is_short_and_needs_no_particular_text() -> None:
    """Files of earlier versions have other texts for a failed check; `gate` decides."""
    checked = {"passed": False, "max": 1.0, "relative": 1.0, "psnr": 0.0}
    assert figures.reason({"gate": checked, "problem": "an older text: 0.5"}) == "correctness check failed"
    assert figures.reason({"gate": checked, "problem": "failed: RuntimeError: while timed"}) == "failed"
    assert figures.reason({"gate": None, "problem": "missing: ImportError"}) == "missing"
