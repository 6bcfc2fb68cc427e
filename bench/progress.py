"""A pytest plugin for supervised runs: it records the progress in a file, and a later run continues from there.

`python -m pytest -p bench.progress ...` with the path of the file in the environment variable `FILE`. A line is a JSON
object: {"start": nodeid, "at": time.time()}, {"failed": nodeid}, {"done": nodeid}, or {"lost": nodeid} if the GPU does
not respond after a test, which ends the run. Tests that have already started according to the file are deselected, so a
new run after a killed one does the remaining tests.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

FILE = "FASTSD_BENCH_PROGRESS"


def read(path: Path) -> list[dict[str, Any]]:
    """The complete lines."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def started(path: Path) -> set[str]:
    """The tests that have started."""
    return {line["start"] for line in read(path) if "start" in line}


def running(path: Path) -> tuple[str, float] | None:
    """The running test and its start time; None between tests."""
    lines = [line for line in read(path) if "failed" not in line]
    if not lines or "start" not in lines[-1]:
        return None
    return lines[-1]["start"], lines[-1]["at"]


def failed(path: Path) -> bool:
    """Whether a test has failed."""
    return any("failed" in line for line in read(path))


def last(path: Path) -> float:
    """The time of the last line; 0 if there is no file."""
    return path.stat().st_mtime if path.exists() else 0.0


def _write(**line: Any) -> None:
    with open(os.environ[FILE], "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    before = started(Path(os.environ[FILE]))
    finished = [item for item in items if item.nodeid in before]
    if finished:
        config.hook.pytest_deselected(items=finished)
        items[:] = [item for item in items if item.nodeid not in before]


def pytest_runtest_logstart(nodeid: str) -> None:
    _write(start=nodeid, at=time.time())


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        _write(failed=report.nodeid)


def pytest_runtest_logfinish(nodeid: str) -> None:
    _write(done=nodeid)
    if not gpu_responds():
        _write(lost=nodeid)
        pytest.exit(f"the GPU does not respond after {nodeid}", returncode=1)


def gpu_responds() -> bool:
    """Whether this process can still use the GPU, or does not use it. After a fault every later call fails."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
