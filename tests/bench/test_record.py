"""The result file: atomic writes, exact reads, errors for other files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import record
from bench.measure import Distance, Limit, Outcome, spread
from fastsd.errors import FastsdError

CPU = torch.device("cpu")
LABELS = {"benchmark": "step", "model": "sd15", "size": 512, "batch": 1, "dtype": "bf16"}


def test_a_file_grows_and_reads_exactly(tmp_path: Path) -> None:
    path = tmp_path / "cpu" / "r.json"
    results = record.Results(path, CPU, {"models": ["sd15"]})
    correct = Outcome("fastsd", Distance(0.1, 1e-3, 40.0), spread([1.0, 2.0, 3.0]), first_call=4.0)
    infinite = Distance(float("inf"), float("inf"), float("-inf"))
    wrong = Outcome("other", infinite, None, "correctness check failed: relative error inf")
    results.add(**LABELS, **record.outcome_fields(correct))
    assert len(record.read(path)["records"]) == 1  # written as soon as it is known
    results.add(**LABELS, **record.outcome_fields(wrong))
    first, second = record.read(path)["records"]
    assert first["seconds"] == {"median": 2.0, "low": 1.0, "high": 3.0, "rounds": 3} and first["gate"]["passed"]
    assert second["seconds"] is None
    assert second["gate"] == {"passed": False, "max": None, "relative": None, "psnr": None}
    data = record.read(path)
    assert {"device", "commit", "versions", "threads", "python", "date"} <= set(data["environment"])
    # torch's own version may add the build, "+cu130", that its package leaves out.
    assert data["environment"]["versions"]["torch"] in (torch.__version__, torch.__version__.split("+")[0])
    assert data["flags"] == {"models": ["sd15"]}


def test_a_record_has_the_achieved_rates_and_the_limit() -> None:
    limit = Limit(0.5, 4e12, 6e9, "bytes")
    fields = record.achieved(limit, Outcome("fastsd", None, spread([2.0])))
    assert fields == {"tflop_s": 2.0, "gb_s": 3.0, "share": 0.25}
    assert record.achieved(limit, Outcome("wrong", None, None, "correctness check failed")) == {}
    assert record.limit_of({"floor": 0.5, "flops": 4e12, "bytes": 6e9, "binds": "bytes"}) == limit
    assert record.limit_of({"benchmark": "update"}) is None


def test_a_second_run_replaces_its_own_records_and_keeps_the_others(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    record.Results(path, CPU, {}).add(**LABELS, candidate="fastsd", seconds={"median": 2.0})
    later = record.Results(path, CPU, {})
    later.add(**LABELS | {"batch": 4}, candidate="fastsd", seconds={"median": 5.0})
    later.add(**LABELS, candidate="fastsd", seconds={"median": 1.0})
    # The new record takes the position of the old one.
    assert [(r["batch"], r["seconds"]["median"]) for r in record.read(path)["records"]] == [(1, 1.0), (4, 5.0)]


@pytest.mark.parametrize("text", ["", "nonsense", "[]", "{}", '{"records": [1]}', '{"format": 99, "records": []}'])
def test_a_file_that_is_not_a_result_file_is_an_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(FastsdError, match="other.json"):
        record.read(path)
    with pytest.raises(FastsdError, match="absent.json"):
        record.read(tmp_path / "absent.json")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    record.write({"format": 1, "records": [{"benchmark": "a"}]}, path)
    with pytest.raises(ValueError):
        record.write({"format": 1, "records": [{"benchmark": float("nan")}]}, path)
    assert json.loads(path.read_text())["records"] == [{"benchmark": "a"}]
    assert list(tmp_path.iterdir()) == [path]


def test_the_committed_results_are_readable() -> None:
    files = sorted((record.ROOT / "bench" / "results").rglob("*.json"))
    assert files
    for file in files:
        for row in record.read(file)["records"]:
            assert row.keys() >= {"benchmark", "candidate", "gate", "seconds"}
            assert row["seconds"] or row["problem"]
