"""The only place where a backend is chosen.

Four backends can exist for an op: `reference` (the specification: a few lines of PyTorch that compute in fp32),
`torch` (PyTorch's public operations in the tensor's dtype: runs everywhere, and is what training differentiates),
`onednn` (the CPU's fast path, without gradients; see `fastsd.kernels.onednn`) and `triton` (our kernels, on CUDA).
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

_forced = threading.local()


def backend(*inputs: torch.Tensor | None) -> str:
    """Name of the backend for an op with these inputs: "reference", "torch" or "onednn".

    A backend without gradients is taken only where none are asked for, of the activations or of the weights.
    """
    forced = getattr(_forced, "name", None)
    if forced is not None:
        return forced
    x = inputs[0]
    assert x is not None
    if x.device.type != "cpu" or x.dtype not in _onednn_dtypes() or x.numel() == 0:
        return "torch"
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return "torch"
    return "onednn"


@functools.cache
def _onednn_dtypes() -> tuple[torch.dtype, ...]:
    """The dtypes that PyTorch's oneDNN computes in by itself on this processor; none where this build lacks it."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return ()
    if not all(hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_convolution_pointwise")):
        return ()
    return (torch.float32, torch.bfloat16) if torch.ops.mkldnn._is_mkldnn_bf16_supported() else (torch.float32,)


@contextmanager
def forced(name: str) -> Iterator[None]:
    """Inside this context every op of this thread runs on the backend `name`, whatever the device."""
    previous = getattr(_forced, "name", None)
    _forced.name = name
    try:
        yield
    finally:
        _forced.name = previous


def reference_only() -> AbstractContextManager[None]:
    """Inside this context every op of this thread runs its fp32 specification."""
    return forced("reference")


def widen(x: torch.Tensor) -> torch.Tensor:
    """`x` in the precision that specifications compute in: fp32, or float64 if it came as that."""
    return x if x.dtype == torch.float64 else x.float()
