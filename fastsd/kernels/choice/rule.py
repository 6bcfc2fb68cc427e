"""The rule of all checks, and the result of a check."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastsd.cuda.capture import ran_out_of_memory
from fastsd.kernels import dispatch

PART = 2**24  # elements compared at a time
Tensors = tuple[torch.Tensor, ...]
Clock = Callable[[Sequence[Callable[[], Any]]], list[float]]


@dataclass(frozen=True)
class CheckResult:
    """The result of one comparison.

    Attributes:
        level: "op", "layer", "module", "image", "graphs" or "interpreter".
        name, shape: what was compared.
        backend: the backend of the fast path.
        calls: number of calls with these shapes in the run.
        error, torch_error: largest difference from the truth, of the fast path and of PyTorch in the same dtype.
        allowed: the largest error that passes.
        seconds, torch_seconds: their times; None if not measured.
        passed: None if the comparison was not judged; `note` says why.
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


def judge(unjudged: CheckResult, fast: Tensors, same_dtype: Tensors, truth: Tensors, slack: float = 0.0) -> CheckResult:
    """Add the errors of `fast` and the verdict to `unjudged`, by the rule

        max|fast - truth| <= 2 max|same_dtype - truth| + 1 ulp of the largest |truth| + slack,

    for each output of an op; the result is that of the output nearest to failing. Elements whose true value exceeds the
    range of the dtype are not compared. If PyTorch's own output is not finite, a finite one passes and any other is not
    judged. `slack` is for fp32 sums, whose error depends on the order of their terms.
    """
    highest, worst = -1.0, unjudged
    for output, plain, exact in zip(fast, same_dtype, truth, strict=True):
        if output.shape != exact.shape:
            return replace(unjudged, passed=False, note=f"shape {list(output.shape)}, expected {list(exact.shape)}")
        if not exact.numel():
            continue
        limits = torch.finfo(output.dtype)
        error, torch_error = (_largest_difference(x, exact, limits.max) for x in (output, plain))
        allowed = 2 * torch_error + _largest_difference(torch.zeros_like(exact), exact, limits.max) * limits.eps + slack
        result = replace(unjudged, error=error, torch_error=torch_error, allowed=allowed)
        if not math.isfinite(allowed):
            passed = True if math.isfinite(error) else None
            result = replace(result, passed=passed, note="PyTorch's output is not finite")
            share = math.inf if passed is None else 0.0
        else:
            result = replace(result, passed=error <= allowed)  # NaN compares false
            share = error / allowed if allowed else math.inf * error
        if not share <= highest:
            highest, worst = share, result
        if result.passed is False:
            return result
    return worst


def _largest_difference(x: torch.Tensor, exact: torch.Tensor, limit: float) -> float:
    """The largest |x - exact| where |exact| does not exceed `limit`; NaN if one is. In parts, for maps of gigabytes."""
    worst = exact.new_zeros(())
    for part, truth in zip(x.reshape(-1).split(PART), exact.reshape(-1).split(PART), strict=True):
        difference = (part.to(exact.dtype) - truth).abs()
        worst = torch.maximum(worst, torch.where(truth.abs() <= limit, difference, 0).max())
    return worst.item()


def note_out_of_memory(unjudged: CheckResult, check: Callable[[], CheckResult]) -> CheckResult:
    """The result of `check`; if the GPU runs out of memory, `unjudged` with a note."""
    try:
        return check()
    except Exception as error:
        if not ran_out_of_memory(error):
            raise
        torch.cuda.empty_cache()
        return replace(unjudged, note="not enough memory to compare")


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Inside this context every op runs its specification, and fp32 products and convolutions do not use TF32."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        with dispatch.reference_only():
            yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def wider(dtype: torch.dtype) -> torch.dtype:
    """The precision of the truth for networks in `dtype`: fp32, and float64 for fp32."""
    return torch.float64 if dtype == torch.float32 else torch.float32
