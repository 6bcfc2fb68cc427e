"""Architecture classes: the keys of the launch tables."""

from __future__ import annotations

import functools

import torch

CLASSES = (75, 80, 86, 90, 100, 120)  # 86 stands for 86 to 89 (Ampere's and Ada's consumer chips)


@functools.cache
def class_of_capability(capability: int) -> int:
    """The largest class that a compute capability reaches."""
    return max((key for key in CLASSES if key <= capability), default=CLASSES[0])


def class_of(device: torch.device) -> int:
    """The architecture class of `device`; 90 for a CPU, which only runs the kernels in Triton's interpreter.

    AMD devices take the rows of 80, whose small tiles fit their 64 KiB of shared memory. They were never run there.
    """
    if device.type != "cuda":
        return 90
    if torch.version.hip:
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return class_of_capability(10 * major + minor)
