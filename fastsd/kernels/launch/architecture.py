"""Architecture classes: the keys of the launch tables."""

from __future__ import annotations

import functools

import torch

CLASSES = (75, 80, 86, 90, 100, 120)  # 86 stands for 86 to 89 (Ampere's and Ada's consumer chips)


@functools.cache
def _of_capability(capability: int) -> int:
    return max((key for key in CLASSES if key <= capability), default=CLASSES[0])


def of(device: torch.device) -> int:
    """The class of a device, the highest key that its compute capability reaches; 90 for a CPU (the interpreter).

    AMD's devices take the rows of 80: the same small tiles, which fit their 64 KiB of shared memory. Not run there.
    """
    if device.type != "cuda":
        return 90
    if torch.version.hip:
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return _of_capability(10 * major + minor)
