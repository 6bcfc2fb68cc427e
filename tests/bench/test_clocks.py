"""The GPU's state from a played driver: before, during, and without what a driver does not report."""

from __future__ import annotations

import sys
import time
from typing import Any

import pytest

from bench.clocks import GpuWatch, read_state, state_text


class PlayedDriver:
    """Functions of nvidia-ml-py; each reading of the clock is 10 MHz lower, at 600 W the power limit acts."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(self) -> None:
        self.sm = 1990

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return "handle"

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:
        if kind == self.NVML_CLOCK_MEM:
            return 2619
        self.sm -= 10
        return self.sm

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        return 61

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        return 600_000

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:  # the older name
        return 0x4 | 0x1  # and idle, which is no reason to worry


@pytest.fixture
def driver(monkeypatch: Any) -> PlayedDriver:
    driver = PlayedDriver()
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    return driver


def test_the_state_before_and_during(driver: PlayedDriver) -> None:
    with GpuWatch(period=0.001) as watch:
        end = time.monotonic() + 10
        while len(watch._samples) < 3:
            assert time.monotonic() < end
            time.sleep(0.001)
    gpu = watch.fields()["gpu"]
    assert gpu["before"] == {
        "sm_mhz": 1980, "memory_mhz": 2619, "celsius": 61, "watts": 600.0, "slowed": ["power limit"]
    }  # fmt: skip
    least, median, most = gpu["during"]["sm_mhz"]
    assert least < median < most == 1970 and gpu["during"]["watts"] == [600.0] * 3
    assert state_text(gpu) == f"{median:.0f} MHz, 61 °C, 600 W, slowed by power limit"


def test_what_the_driver_does_not_report_is_missing(driver: PlayedDriver, monkeypatch: Any) -> None:
    def unsupported(handle: str) -> int:
        raise RuntimeError("Not Supported")

    monkeypatch.setattr(driver, "nvmlDeviceGetPowerUsage", unsupported)
    assert "watts" not in read_state() and read_state()["celsius"] == 61
    assert state_text({"during": {"celsius": [60, 61, 62], "slowed": []}}) == "62 °C"


def test_without_a_driver_there_is_nothing(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with GpuWatch(period=0.001) as watch:
        pass
    assert watch.fields() == {} and state_text({}) == "" and not watch._thread.is_alive()
