"""The peak memory according to a fake driver: a peak between two readings counts."""

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
    """Functions of nvidia-ml-py; a test sets the memory of this process (`own`) and of the device (`all`)."""

    def __init__(self, known: bool = True):
        self.known, self.own, self.all, self.opened = known, GIB, 5 * GIB, []

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        self.opened.append(index)
        return "handle"

    def nvmlDeviceGetHandleByUUID(self, name: str) -> str:
        self.opened.append(name)
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


def wait_until(condition: Any) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_a_peak_between_two_readings_counts_and_then_resets(driver: Driver) -> None:
    peak = DriverPeak(period=0.001).start()
    wait_until(lambda: peak._peak == GIB)
    driver.own = 3 * GIB
    wait_until(lambda: peak._peak == 3 * GIB)
    driver.own = 2 * GIB
    assert peak.take() == 3 * GIB
    peak.stop()
    assert peak.take() == 2 * GIB and not peak._thread.is_alive()


def test_an_unknown_process_has_the_memory_beyond_that_of_others(driver: Driver) -> None:
    driver.known = False
    others = in_use()
    driver.all += 2 * GIB
    peak = DriverPeak(others)
    assert others == 5 * GIB and peak.take() == 2 * GIB


@pytest.mark.parametrize(("visible", "opened"), [("3,1", 3), ("GPU-7f", "GPU-7f"), ("", 0)])
def test_the_device_is_the_first_visible_one(driver: Driver, monkeypatch: Any, visible: str, opened: Any) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert DriverPeak().take() == GIB and driver.opened == [opened]


def test_without_library_or_driver_there_is_a_reason_instead_of_a_peak(driver: Driver, monkeypatch: Any) -> None:
    def fail() -> None:
        raise RuntimeError("Driver Not Loaded")

    driver.nvmlInit = fail  # type: ignore[method-assign]
    peak = DriverPeak().start()
    peak._thread.join(10)  # the thread ends
    assert peak.take() is None and "Driver Not Loaded" in peak.problem and in_use() == 0
    monkeypatch.setitem(sys.modules, "pynvml", None)  # its import fails
    missing = DriverPeak()
    assert missing.take() is None and "pynvml" in missing.problem
