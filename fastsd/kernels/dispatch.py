"""The only place where a backend is chosen.

Four backends can exist for an op: `reference` (the specification: a few lines of PyTorch that compute in fp32),
`torch` (PyTorch's public operations in the tensor's dtype: runs everywhere, and is what training differentiates),
`onednn` (the CPU's fast path, without gradients; see `fastsd.kernels.cpu.onednn`) and `triton` (our kernels, on CUDA,
in `fastsd.kernels.triton`; of the ops, attention alone has gradients there). Under `triton`, an op without a kernel
runs PyTorch's.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch

from fastsd.errors import FastsdError

log = logging.getLogger(__name__)

OLDEST_TRITON = (3, 6)
OLDEST_GPU = (7, 5)
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ONEDNN_OPERATORS = ("_linear_pointwise", "_convolution_pointwise", "_convolution_transpose_pointwise")
# Ops whose CPU path calls nothing of oneDNN's, only PyTorch's operations: every processor runs it in these dtypes.
WITHOUT_ONEDNN = {"groupnorm_silu": (torch.float16, torch.bfloat16, torch.float32)}


class _ForcedBackend(threading.local):
    """The backend that is forced in this thread; a default of the class is found five times as fast as `getattr`'s."""

    name: str | None = None


_forced = _ForcedBackend()
_warned: set[tuple[str, str]] = set()


def backend(*inputs: torch.Tensor | None, op: str = "", gradients: Sequence[torch.dtype] = ()) -> str:
    """Name of the backend for an op with these inputs: "reference", "torch", "onednn" or "triton".

    Where gradients are recorded, that is "torch", unless kernels of the op compute them in this dtype; where autocast
    lets the inputs differ in dtype, it is "torch" too. A forced backend is returned even then; a launcher without
    gradients refuses.

    Args:
        inputs: the activation first, then the op's other tensors.
        op: the name of the op, if it is one of `WITHOUT_ONEDNN`.
        gradients: the dtypes in which Triton kernels compute the op's gradients.
    """
    return _forced.name or _natural(inputs, op, gradients)


def records(*inputs: torch.Tensor | None) -> bool:
    """Whether gradients of an op with these inputs are recorded."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def folds(*inputs: torch.Tensor | None) -> bool:
    """Whether a model with these inputs gives biases to ops that add them for nothing on a GPU, and adds in place.

    The results are the same but for rounding. A forced backend only decides who computes them, except that "triton" is
    a GPU's on any device. Where gradients are recorded, nothing is added in place: a layer further on may need them.
    """
    return _forced.name == "triton" or (not torch.is_grad_enabled() and _natural(inputs) == "triton")


def _natural(inputs: tuple[torch.Tensor | None, ...], op: str = "", gradients: Sequence[torch.dtype] = ()) -> str:
    """The backend where none is forced."""
    x = inputs[0]
    assert x is not None
    recorded = records(*inputs)
    if recorded and x.dtype not in gradients:
        return "torch"
    device = "cuda" if x.is_cuda else "cpu"
    if torch.is_autocast_enabled(device) and any(t is not None and t.dtype != x.dtype for t in inputs):
        return "torch"
    if not x.is_cpu or interpreted():
        ours = (x.is_cuda or interpreted()) and x.dtype in TRITON_DTYPES and _can_run_triton(x.device)
        return "triton" if ours else "torch"
    if recorded or x.numel() == 0:
        return "torch"
    return "onednn" if x.dtype in (WITHOUT_ONEDNN.get(op) or onednn_dtypes()) else "torch"


@functools.cache
def interpreted() -> bool:
    """Whether Triton interprets its kernels, on CPU tensors: TRITON_INTERPRET=1, read once, as Triton does."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _can_run_triton(device: torch.device) -> bool:
    """Whether our kernels run on `device`; one warning if they do not, because PyTorch's are slower."""
    reason = why_no_triton(device)
    if reason is not None:
        log.warning("fastsd's kernels do not run here: %s; PyTorch's are used, which are slower", reason)
    return reason is None


def why_no_triton(device: torch.device) -> str | None:
    """Why our kernels do not run on `device`; None if they do."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "Triton is not installed (pip install triton)"
    if _release(version) < OLDEST_TRITON:
        return f"Triton {version} is too old, they need {'.'.join(map(str, OLDEST_TRITON))} or newer"
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST_GPU:
            name, (major, minor) = torch.cuda.get_device_name(device), capability
            return f"{name} has compute capability {major}.{minor}, they need {OLDEST_GPU[0]}.{OLDEST_GPU[1]} or newer"
    numpy = importlib.metadata.version("numpy")
    if device.type == "cpu" and _release(version) < (3, 7) and _release(numpy) >= (2, 4):
        return f"the interpreter of Triton {version} needs numpy older than 2.4, this is {numpy}"
    return None


def _release(version: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    return tuple(int(part) for part in version.split(".")[:2])


@functools.cache
def onednn_dtypes() -> tuple[torch.dtype, ...]:
    """The dtypes in which PyTorch's oneDNN computes natively on this processor; none if this build lacks oneDNN."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return ()
    if not all(hasattr(torch.ops.mkldnn, name) for name in ONEDNN_OPERATORS):
        return ()
    return (torch.float32, torch.bfloat16) if torch.ops.mkldnn._is_mkldnn_bf16_supported() else (torch.float32,)


@contextmanager
def forced(name: str) -> Iterator[None]:
    """Inside this context every op of this thread runs on the backend `name`, on any device."""
    previous = _forced.name
    _forced.name = name
    try:
        yield
    finally:
        _forced.name = previous


def forced_name() -> str | None:
    """The backend that is forced in this thread, or None."""
    return _forced.name


def reference_only() -> AbstractContextManager[None]:
    """Inside this context every op of this thread runs its fp32 specification."""
    return forced("reference")


def fall_back(op: str, reason: str) -> None:
    """Warn, once per reason, that PyTorch computes a call of `op` that our kernel does not take.

    Raises:
        FastsdError: the Triton backend is forced.
    """
    if _forced.name == "triton":
        raise FastsdError(f"{op}: {reason}")
    if (op, reason) not in _warned:
        _warned.add((op, reason))
        log.warning("%s: %s; PyTorch computes it instead", op, reason)


def widen(x: torch.Tensor) -> torch.Tensor:
    """`x` in the precision of a specification: fp32, or float64 if it is float64."""
    return x if x.dtype == torch.float64 else x.float()
