"""A process's peak of memory on a GPU as its driver counts it, which knows no peak: sampled while the process works.

The driver's figure holds what PyTorch's allocator does not know: the context, the code of kernels, libraries' buffers.
"""

from __future__ import annotations

import os
import threading
from typing import Any

PERIOD = 0.005  # seconds between two samples; a picture's largest maps live longer


class DriverPeak:
    """Samples from a thread of its own until it is stopped; with no nvidia-ml-py or no driver, knows nothing.

    In a container the driver may not know our process by its number. Then everything on the device counts, less what
    others had there before this process came.
    """

    def __init__(self, others: int = 0, period: float = PERIOD):
        """others: bytes in use on the device before this process used it, see `in_use`."""
        self.others, self.period = others, period
        self.problem = ""  # why there is no figure
        self._most = 0
        self._read: Any = None  # (pynvml, the device's handle)
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="driver's memory", daemon=True)

    def start(self) -> DriverPeak:
        self._thread.start()
        return self

    def take(self) -> int | None:
        """The peak in bytes since the last call, or since the start; None where the driver says nothing."""
        self._look()
        with self._lock:
            most, self._most = self._most, 0
        return most or None

    def stop(self) -> None:
        self._end.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self.problem and not self._end.is_set():
            self._look()
            self._end.wait(self.period)

    def _look(self) -> None:
        with self._lock:
            if self.problem:
                return
            try:
                self._read = self._read or _open()
                self._most = max(self._most, _used(*self._read, self.others))
            except Exception as error:  # no library, no driver, a figure that this driver does not give
                self.problem = f"{type(error).__name__}: {error}"


def in_use() -> int:
    """Bytes in use on the device by all processes; 0 where the driver says nothing."""
    try:
        nvml, handle = _open()
        return int(nvml.nvmlDeviceGetMemoryInfo(handle).used)
    except Exception:
        return 0


def _open() -> tuple[Any, Any]:
    """The library, and the handle of the first device that CUDA shows to this process."""
    import pynvml

    pynvml.nvmlInit()
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    if first.startswith(("GPU-", "MIG-")):
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(first)
    return pynvml, pynvml.nvmlDeviceGetHandleByIndex(int(first or 0))


def _used(nvml: Any, handle: Any, others: int) -> int:
    """Bytes of this process now."""
    processes = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
    own = [p.usedGpuMemory for p in processes if p.pid == os.getpid() and p.usedGpuMemory]
    return int(own[0]) if own else max(0, int(nvml.nvmlDeviceGetMemoryInfo(handle).used) - others)
