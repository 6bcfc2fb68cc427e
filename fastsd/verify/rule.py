"""The rule that everything is held to, and the row that says how it went."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastsd.kernels import dispatch

Tensors = tuple[torch.Tensor, ...]
Clock = Callable[[Sequence[Callable[[], Any]]], list[float]]


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        level: "op", "layer", "module", "image", "graphs" or "interpreter".
        name, shape: what was compared.
        backend: what computed it.
        calls: how often the run called it with these shapes.
        error, torch_error: largest distance from the truth of the fast path and of PyTorch in the same dtype.
        allowed: the largest error that passes.
        seconds, torch_seconds: the time of both; None where it was not taken.
        passed: None where there was nothing to judge; `note` says why.
    """

    level: str
    name: str
    shape: str = ""
    backend: str = ""
    calls: int = 1
    error: float | None = None
    torch_error: float | None = None
    allowed: float | None = None
    seconds: float | None = None
    torch_seconds: float | None = None
    passed: bool | None = None
    note: str = ""


def judged(row: Row, fast: Tensors, same_dtype: Tensors, truth: Tensors, slack: float = 0.0) -> Row:
    """`row` with the errors of `fast` and the verdict, by the rule

        max|fast - truth| <= 2 max|same_dtype - truth| + 1 ulp of the largest |truth| + slack,

    for each tensor of an op's results; the row tells of the one that comes nearest to failing. Numbers that the dtype
    cannot hold are left out. Where PyTorch's own result is not finite, a finite one passes and another is not judged.
    `slack` is for sums of fp32 numbers in fp32, whose error depends on their order.
    """
    worst, found = -1.0, row
    for result, plain, exact in zip(fast, same_dtype, truth, strict=True):
        if result.shape != exact.shape:
            return replace(row, passed=False, note=f"shape {list(result.shape)} where {list(exact.shape)} is right")
        if not exact.numel():
            continue
        limits = torch.finfo(result.dtype)
        held = exact.abs() <= limits.max
        error, torch_error = (_largest((x.to(exact.dtype) - exact)[held]) for x in (result, plain))
        allowed = 2 * torch_error + _largest(exact[held]) * limits.eps + slack
        judged = replace(row, error=error, torch_error=torch_error, allowed=allowed)
        if not math.isfinite(allowed):
            passed = True if math.isfinite(error) else None
            judged = replace(judged, passed=passed, note="PyTorch's result is not finite")
            nearness = math.inf if passed is None else 0.0
        else:
            judged = replace(judged, passed=error <= allowed)  # a NaN passes nothing
            nearness = error / allowed if allowed else math.inf * error
        if not nearness <= worst:
            worst, found = nearness, judged
        if judged.passed is False:
            return judged
    return found


def _largest(x: torch.Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def attempted(row: Row, work: Callable[[], Row]) -> Row:
    """What `work` gives; where the GPU's memory does not suffice, `row` with a note and no verdict."""
    try:
        return work()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return replace(row, note="too little memory to compare")


@contextmanager
def exactly() -> Iterator[None]:
    """Inside this context every op runs its specification, and fp32 is fp32: no TF32 in products or convolutions."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        with dispatch.reference_only():
            yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def wider(dtype: torch.dtype) -> torch.dtype:
    """The precision that whole networks of `dtype` are compared with: fp32, and float64 for fp32 itself."""
    return torch.float64 if dtype == torch.float32 else torch.float32
