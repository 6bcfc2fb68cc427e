"""The peak GPU memory of a process according to the driver, sampled while the process runs: the driver has no peak.

The driver's number includes what PyTorch's allocator does not see: the context, kernel code, buffers of libraries.
"""

from __future__ import annotations

import os
import threading
from typing import Any

PERIOD = 0.005  # seconds between two samples; the largest activations of an image live longer


class DriverPeak:
    """Samples the memory from a thread until `stop`; without nvidia-ml-py or a driver there is no result.

    In a container the driver may know this process by another id. Then the result is all memory in use on the device,
    minus the memory that was in use before this process.
    """

    def __init__(self, others: int = 0, period: float = PERIOD):
        """`others`: bytes in use on the device before this process used it, see `in_use`."""
        self.others, self.period = others, period
        self.problem = ""  # why there is no result
        self._peak = 0
        self._device: Any = None  # (pynvml, handle of the device)
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="driver's memory", daemon=True)

    def start(self) -> DriverPeak:
        self._thread.start()
        return self

    def take(self) -> int | None:
        """The peak in bytes since the last call, or since the start; None if the driver does not report it."""
        self._update()
        with self._lock:
            peak, self._peak = self._peak, 0
        return peak or None

    def stop(self) -> None:
        self._end.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self.problem and not self._end.is_set():
            self._update()
            self._end.wait(self.period)

    def _update(self) -> None:
        with self._lock:
            if self.problem:
                return
            try:
                self._device = self._device or open_nvml()
                self._peak = max(self._peak, _used(*self._device, self.others))
            except Exception as error:  # no library, no driver, or a value that this driver does not report
                self.problem = f"{type(error).__name__}: {error}"


def in_use() -> int:
    """Bytes in use on the device by all processes; 0 if the driver does not report them."""
    try:
        nvml, handle = open_nvml()
        return int(nvml.nvmlDeviceGetMemoryInfo(handle).used)
    except Exception:
        return 0


def open_nvml() -> tuple[Any, Any]:
    """pynvml, and the handle of the first device that is visible to CUDA in this process."""
    import pynvml

    pynvml.nvmlInit()
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    if first.startswith(("GPU-", "MIG-")):
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(first)
    return pynvml, pynvml.nvmlDeviceGetHandleByIndex(int(first or 0))


def _used(nvml: Any, handle: Any, others: int) -> int:
    """The current memory of this process in bytes."""
    processes = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
    own = [p.usedGpuMemory for p in processes if p.pid == os.getpid() and p.usedGpuMemory]
    return int(own[0]) if own else max(0, int(nvml.nvmlDeviceGetMemoryInfo(handle).used) - others)
