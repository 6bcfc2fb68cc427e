"""Faster, slower and lost results between two files, and the exit codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench import compare, record
from tests.support.benchmarks import record_of


def data(candidate: str = "fastsd", **seconds: float) -> dict[str, Any]:
    """A file with one record, with these times; without any, its correctness check failed."""
    record = record_of(candidate, None) | ({"seconds": {"rounds": 5, **seconds}} if seconds else {})
    return {"format": 1, "records": [record]}


OLD = data(median=1.0, low=0.98, high=1.02)


@pytest.mark.parametrize(
    ("new", "code", "output"),
    [
        (data(median=1.0, low=0.99, high=1.01), 0, "1 of 1 unchanged"),
        (data(median=1.10, low=1.01, high=1.2), 0, "1 of 1 unchanged"),  # slower, within the spread
        (data(median=1.025, low=1.021, high=1.03), 0, "slower"),  # beyond the spread, by less than 3%
        (data(median=1.05, low=1.04, high=1.06), 1, "1.050 x"),
        (data(median=0.5, low=0.4, high=0.6), 0, "faster"),
        (data(), 1, "lost    step sd15 512 1 bf16 fastsd: correctness check failed"),
    ],
)
def test_changes_and_exit_codes(tmp_path: Path, new: Any, code: int, output: str, capsys: Any) -> None:
    record.write(OLD, tmp_path / "old.json")
    record.write(new, tmp_path / "new.json")
    assert compare.main([str(tmp_path / "old.json"), str(tmp_path / "new.json")]) == code
    assert output in capsys.readouterr().out


def test_a_slower_peer_is_not_a_regression(tmp_path: Path) -> None:
    record.write(data("diffusers", median=1.0, low=1.0, high=1.0), tmp_path / "old.json")
    record.write(data("diffusers", median=2.0, low=2.0, high=2.0), tmp_path / "new.json")
    assert compare.main([str(tmp_path / "old.json"), str(tmp_path / "new.json")]) == 0


def test_files_that_cannot_be_compared_are_errors(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "bad.json").write_text("not a result file")
    record.write(OLD, tmp_path / "old.json")
    record.write({"format": 1, "records": []}, tmp_path / "empty.json")
    for other, message in (("bad.json", "bad.json"), ("absent.json", "absent.json"), ("empty.json", "in common")):
        assert compare.main([str(tmp_path / "old.json"), str(tmp_path / other)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1
