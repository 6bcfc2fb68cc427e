"""A plugin of pytest for runs that are watched: which test is running, in a file; and a second run goes on after it.

`python -m pytest -p bench.progress ...` with the file's path in the environment (`FILE`). A line is one JSON object:
{"start": nodeid, "at": time.time()}, {"failed": nodeid}, {"done": nodeid}, or {"lost": nodeid} where the GPU answers no
more after a test, which ends the run. Tests that stand in the file as started are left out, so that a run after one
that was killed or lost does what it left.
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
    """The lines that are whole."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def started(path: Path) -> set[str]:
    return {line["start"] for line in read(path) if "start" in line}


def running(path: Path) -> tuple[str, float] | None:
    """The test that is running and when it started; None between tests."""
    lines = [line for line in read(path) if "failed" not in line]
    if not lines or "start" not in lines[-1]:
        return None
    return lines[-1]["start"], lines[-1]["at"]


def failed(path: Path) -> bool:
    """Whether a test has failed."""
    return any("failed" in line for line in read(path))


def last(path: Path) -> float:
    """When a test last started or ended; 0 where none has."""
    return path.stat().st_mtime if path.exists() else 0.0


def _note(**line: Any) -> None:
    with open(os.environ[FILE], "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    before = started(Path(os.environ[FILE]))
    old = [item for item in items if item.nodeid in before]
    if old:
        config.hook.pytest_deselected(items=old)
        items[:] = [item for item in items if item.nodeid not in before]


def pytest_runtest_logstart(nodeid: str) -> None:
    _note(start=nodeid, at=time.time())


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        _note(failed=report.nodeid)


def pytest_runtest_logfinish(nodeid: str) -> None:
    _note(done=nodeid)
    if not alive():
        _note(lost=nodeid)
        pytest.exit(f"the GPU answers no more after {nodeid}", returncode=1)


def alive() -> bool:
    """Whether this process can still use the GPU: after a fault every later call fails, whatever it does."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
