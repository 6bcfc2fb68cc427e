"""The only place where a backend is chosen.

Three backends can exist for an op: `reference` (the specification: a few lines of PyTorch that compute in fp32),
`torch` (PyTorch's own fused operations in the tensor's dtype: what the CPU runs, and what training differentiates)
and `triton` (our kernels, on CUDA).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_forced = threading.local()


def backend(x: torch.Tensor) -> str:
    """Name of the backend for an op whose first input is `x`: "reference" or "torch"."""
    return getattr(_forced, "name", None) or "torch"


@contextmanager
def reference_only() -> Iterator[None]:
    """Inside this context every op of this thread runs its fp32 specification, whatever the device."""
    previous = getattr(_forced, "name", None)
    _forced.name = "reference"
    try:
        yield
    finally:
        _forced.name = previous


def widen(x: torch.Tensor) -> torch.Tensor:
    """`x` in the precision that specifications compute in: fp32, or float64 if it came as that."""
    return x if x.dtype == torch.float64 else x.float()
