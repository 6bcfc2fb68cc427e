"""The GPU's clocks, temperature and power, before a measurement and during it, as the driver tells them (nvidia-ml-py).

A GPU that is hot or at its power limit lowers its clocks, so two times are comparable only where these agree.
"""

from __future__ import annotations

import contextlib
import statistics
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

from bench.memory import open_nvml

PERIOD = 0.1  # seconds between two samples: the driver itself averages power over about as long
# Bits of `nvmlDeviceGetCurrentClocksEventReasons` that lower the clocks under load (nvml.h).
REASONS = {
    0x04: "power limit",
    0x08: "hardware slowdown",
    0x20: "temperature (software)",
    0x40: "temperature (hardware)",
    0x80: "power brake",
}
State = dict[str, Any]


def read_state() -> State:
    """Clocks in MHz, degrees Celsius, watts, why the clocks are lowered; without what the driver does not report."""
    state: State = {}
    with contextlib.suppress(Exception):  # no library, no driver
        nvml, handle = open_nvml()
        values: dict[str, Callable[[], Any]] = {
            "sm_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            "memory_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
            "celsius": lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
            "watts": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            "slowed": lambda: _reasons(nvml, handle),
        }
        for name, value in values.items():
            with contextlib.suppress(Exception):  # this driver does not report it
                state[name] = value()
    return state


def _reasons(nvml: Any, handle: Any) -> list[str]:
    read = getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None)
    bits = (read or nvml.nvmlDeviceGetCurrentClocksThrottleReasons)(handle)  # the older name
    return [name for bit, name in REASONS.items() if bits & bit]


class GpuWatch:
    """Inside this context a thread samples the GPU's state. Without a driver there are no samples, and no thread."""

    def __init__(self, period: float = PERIOD):
        self.period = period
        self.before: State = {}
        self._samples: list[State] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="GPU's clocks", daemon=True)

    def __enter__(self) -> GpuWatch:
        self.before = read_state()
        if self.before:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end.set()
        if self.before:
            self._thread.join()

    def _sample(self) -> None:
        while not self._end.wait(self.period):
            self._samples.append(read_state())

    def fields(self) -> dict[str, Any]:
        """The field of a record: the state before, and of each number the least, the median and the largest since."""
        if not self.before:
            return {}
        samples = list(self._samples)
        during: State = {"samples": len(samples)}
        for name in ("sm_mhz", "memory_mhz", "celsius", "watts"):
            values = [sample[name] for sample in samples if name in sample]
            if values:
                during[name] = [min(values), statistics.median(values), max(values)]
        during["slowed"] = sorted({reason for sample in samples for reason in sample.get("slowed", ())})
        return {"gpu": {"before": self.before, "during": during}}


def state_text(gpu: dict[str, Any]) -> str:
    """The field of a record in a few words: the median clock, the largest temperature and power, what lowered it."""
    during, parts = gpu.get("during", {}), []
    for name, unit, which in (("sm_mhz", "MHz", 1), ("celsius", "°C", 2), ("watts", "W", 2)):
        if name in during:
            parts.append(f"{during[name][which]:.0f} {unit}")
    if during.get("slowed"):
        parts.append(f"slowed by {', '.join(during['slowed'])}")
    return ", ".join(parts)
