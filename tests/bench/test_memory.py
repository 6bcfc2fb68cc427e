"""The driver's peak of memory, from a driver that is played: what comes and goes between two looks is still seen."""

from __future__ import annotations

import os
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest

from bench.memory import DriverPeak, in_use

GIB = 2**30


class Driver:
    """nvidia-ml-py's functions that are used, over `own` and `all` bytes that a test changes."""

    def __init__(self, known: bool = True):
        self.known, self.own, self.all, self.asked = known, GIB, 5 * GIB, []

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        self.asked.append(index)
        return "handle"

    def nvmlDeviceGetHandleByUUID(self, name: str) -> str:
        self.asked.append(name)
        return "handle"

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Any]:
        assert handle == "handle"
        other = SimpleNamespace(pid=os.getpid() + 1, usedGpuMemory=40 * GIB)
        return [other, SimpleNamespace(pid=os.getpid() if self.known else -1, usedGpuMemory=self.own)]

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        return SimpleNamespace(used=self.all)


@pytest.fixture
def driver(monkeypatch: Any) -> Driver:
    driver = Driver()
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return driver


def until(true: Any) -> None:
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_a_peak_between_two_looks_is_seen_and_the_next_begins_anew(driver: Driver) -> None:
    peak = DriverPeak(period=0.001).start()
    until(lambda: peak._most == GIB)
    driver.own = 3 * GIB
    until(lambda: peak._most == 3 * GIB)
    driver.own = 2 * GIB
    assert peak.take() == 3 * GIB
    peak.stop()
    assert peak.take() == 2 * GIB and not peak._thread.is_alive()


def test_a_process_that_the_driver_does_not_know_counts_what_came_on_top(driver: Driver) -> None:
    driver.known = False
    others = in_use()
    driver.all += 2 * GIB
    peak = DriverPeak(others)
    assert others == 5 * GIB and peak.take() == 2 * GIB


@pytest.mark.parametrize(("shown", "asked"), [("3,1", 3), ("GPU-7f", "GPU-7f"), ("", 0)])
def test_the_device_is_the_one_that_cuda_shows(driver: Driver, monkeypatch: Any, shown: str, asked: Any) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    assert DriverPeak().take() == GIB and driver.asked == [asked]


def test_without_the_library_or_the_driver_there_is_no_figure_and_a_reason(driver: Driver, monkeypatch: Any) -> None:
    def fail() -> None:
        raise RuntimeError("Driver Not Loaded")

    driver.nvmlInit = fail  # type: ignore[method-assign]
    peak = DriverPeak().start()
    peak._thread.join(10)  # it ends by itself
    assert peak.take() is None and "Driver Not Loaded" in peak.problem and in_use() == 0
    monkeypatch.setitem(sys.modules, "pynvml", None)  # an import of it fails
    gone = DriverPeak()
    assert gone.take() is None and "pynvml" in gone.problem
