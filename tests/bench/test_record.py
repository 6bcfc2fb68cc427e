"""The result file: whole or not at all, read back as written, refused when it is something else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import record
from bench.measure import Distance, Limit, Outcome, spread
from fastsd.errors import FastsdError

CPU = torch.device("cpu")
LABELS = {"contest": "step", "model": "sd15", "size": 512, "batch": 1, "dtype": "bf16"}


def test_a_file_grows_and_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "cpu" / "r.json"
    results = record.Results(path, CPU, {"models": ["sd15"]})
    good = Outcome("fastsd", Distance(0.1, 1e-3, 40.0), spread([1.0, 2.0, 3.0]), first_call=4.0)
    red = Outcome("other", Distance(float("inf"), float("inf"), float("-inf")), None, "red gate: relative error inf")
    results.add(**LABELS, **record.outcome_fields(good))
    assert len(record.read(path)["records"]) == 1  # written as soon as it is known
    results.add(**LABELS, **record.outcome_fields(red))
    first, second = record.read(path)["records"]
    assert first["seconds"] == {"median": 2.0, "low": 1.0, "high": 3.0, "rounds": 3} and first["gate"]["passed"]
    assert second["seconds"] is None and second["gate"] == {
        "passed": False,
        "max": None,
        "relative": None,
        "psnr": None,
    }
    data = record.read(path)
    assert {"device", "commit", "versions", "threads", "python", "date"} <= set(data["environment"])
    assert data["environment"]["versions"]["torch"] == torch.__version__
    assert data["flags"] == {"models": ["sd15"]}


def test_a_record_says_what_was_reached_and_of_what() -> None:
    limit = Limit(0.5, 4e12, 6e9, "bytes")
    fields = record.achieved(limit, Outcome("fastsd", None, spread([2.0])))
    assert fields == {"tflop_s": 2.0, "gb_s": 3.0, "share": 0.25}
    assert record.achieved(limit, Outcome("red", None, None, "red gate")) == {}
    assert record.limit_of({"floor": 0.5, "flops": 4e12, "bytes": 6e9, "binds": "bytes"}) == limit
    assert record.limit_of({"contest": "update"}) is None


def test_a_second_run_replaces_its_own_records_and_keeps_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    record.Results(path, CPU, {}).add(**LABELS, candidate="fastsd", seconds={"median": 2.0})
    later = record.Results(path, CPU, {})
    later.add(**LABELS | {"batch": 4}, candidate="fastsd", seconds={"median": 5.0})
    later.add(**LABELS, candidate="fastsd", seconds={"median": 1.0})
    # In the place of the old one.
    assert [(r["batch"], r["seconds"]["median"]) for r in record.read(path)["records"]] == [(1, 1.0), (4, 5.0)]


@pytest.mark.parametrize("text", ["", "nonsense", "[]", "{}", '{"records": [1]}', '{"format": 99, "records": []}'])
def test_what_is_not_a_result_file_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(FastsdError, match="other.json"):
        record.read(path)
    with pytest.raises(FastsdError, match="absent.json"):
        record.read(tmp_path / "absent.json")


def test_a_failed_write_leaves_the_last_good_file(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    record.write({"format": 1, "records": [{"contest": "a"}]}, path)
    with pytest.raises(ValueError):
        record.write({"format": 1, "records": [{"contest": float("nan")}]}, path)
    assert json.loads(path.read_text())["records"] == [{"contest": "a"}]
    assert list(tmp_path.iterdir()) == [path]
