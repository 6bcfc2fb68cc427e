"""Which of NVIDIA's libraries computes a product: cuBLAS, or cuBLASLt, which chooses among other kernels."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_lock = threading.RLock()  # PyTorch has one switch for the process


@contextmanager
def preferred(library: str) -> Iterator[None]:
    """Inside this context `library` computes products: "cublas" or "cublaslt". The caller's choice comes back after it.

    The switch is the process's: a product that another thread starts meanwhile may be computed by it too. One thread
    at a time is inside.

    Raises:
        RuntimeError: this build of PyTorch has no such library.
    """
    with _lock:
        before = torch.backends.cuda.preferred_blas_library()
        torch.backends.cuda.preferred_blas_library(library)
        try:
            yield
        finally:
            torch.backends.cuda.preferred_blas_library(before)
