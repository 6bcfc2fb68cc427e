"""The candidates of an op under the backend `triton`: our kernels and PyTorch's own ops, of which one computes a call.

A candidate that fails on this machine (it does not compile, it does not fit the GPU) is replaced by the next one, said
once by its name, and not tried again for this call's sizes. The last candidate of each op is PyTorch's own op.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from fastsd.errors import FastsdError
from fastsd.kernels import dispatch

Key = tuple[Any, ...]


def _none(*_: Any) -> None:
    return None


@dataclass(frozen=True)
class OpCandidate:
    """One way to compute an op.

    Attributes:
        name: unique within the op: "triton" for our kernel, "torch" for PyTorch's own op.
        run: computes the op; it has all arguments of the op, in their order.
        refuses: of the same arguments: None, or the reason why this candidate does not take them.
        partial: it is made for some calls only, so that a refusal is nothing to tell.
    """

    name: str
    run: Callable[..., Any]
    refuses: Callable[..., str | None] = _none
    partial: bool = False


@dataclass(frozen=True, eq=False)
class GpuOp:
    """An op with its candidates, in the order of preference where none is measured.

    Attributes:
        name: of the function in `fastsd.kernels`.
        reference: its specification, of the same arguments.
        candidates: the last one is PyTorch's own, and takes every call.
        in_place: positions of the arguments that the op modifies.
        first: of the same arguments: the name of the candidate that is preferred for them; None: the order decides.
    """

    name: str
    reference: Callable[..., Any]
    candidates: tuple[OpCandidate, ...]
    in_place: tuple[int, ...] = ()
    first: Callable[..., str | None] = _none

    def in_order(self, args: tuple[Any, ...]) -> list[OpCandidate]:
        """The candidates in the order of preference for these arguments."""
        first = self.first(*args)
        return sorted(self.candidates, key=lambda candidate: candidate.name != first)

    def candidate(self, name: str) -> OpCandidate:
        """The candidate of that name."""
        return next(candidate for candidate in self.candidates if candidate.name == name)


_only = threading.local()
_failed: dict[tuple[str, str, Key], dict[str, str]] = {}  # (device, op, key): reasons by candidate
_said: set[tuple[str, str]] = set()


def key_of(args: tuple[Any, ...]) -> Key:
    """What may decide which candidate is fastest: sizes, strides and dtypes of tensors, and every value but floats."""
    return tuple([_kind(x) for x in args])


def _kind(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return (x.dtype, x.shape) if x.is_contiguous() else (x.dtype, x.shape, x.stride())
    return float if isinstance(x, float) else x


def run(op: GpuOp, *args: Any) -> Any:
    """Compute a call by a candidate of `op` that takes it.

    Args:
        args: all arguments of the op, positional; the first is a tensor on the op's device.

    Raises:
        FastsdError: the backend `triton` is forced, and our kernel does not take the call.
        Exception: what the first candidate raised, if all fail; what any raises if memory or the GPU itself is lost.
    """
    named = getattr(_only, "names", {}).get(op.name)
    if named is not None:
        return op.candidate(named).run(*args)
    if dispatch.forced_name() == "triton":
        return next(_taking(op, args)).run(*args)
    failed = _failed.get((str(args[0].device), op.name, key_of(args)), {})
    error: Exception | None = None
    for candidate in _taking(op, args):
        if candidate.name in failed:
            continue
        try:
            result = candidate.run(*args)
        except (torch.OutOfMemoryError, FastsdError):
            raise
        except Exception as fault:
            if device_is_lost(fault):
                raise
            error = error or fault
            failed = {**failed, candidate.name: reason_of(fault)}
            continue
        if error is not None:
            _remember(op, args, failed, candidate)
        return result
    assert error is not None  # the last candidate takes every call
    raise error


def _taking(op: GpuOp, args: tuple[Any, ...]) -> Iterator[OpCandidate]:
    """The candidates that take the call. A refusal of one that should take every call is told.

    Raises:
        FastsdError: such a refusal, while the backend `triton` is forced.
    """
    for candidate in op.in_order(args):
        reason = candidate.refuses(*args)
        if reason is None:
            yield candidate
        elif not candidate.partial:
            dispatch.fall_back(op.name, reason)


def _remember(op: GpuOp, args: tuple[Any, ...], failed: dict[str, str], instead: OpCandidate) -> None:
    """Note which candidates failed, and say it once for each."""
    _failed[(str(args[0].device), op.name, key_of(args))] = failed
    for name, reason in failed.items():
        if (op.name, name) not in _said:
            _said.add((op.name, name))
            warnings.warn(
                f"{op.name}: candidate {name!r} fails on this machine ({reason}); {instead.name!r} computes it instead",
                RuntimeWarning,
                stacklevel=4,
            )


def reason_of(error: BaseException) -> str:
    """An error in one line: its type and its root cause's last line."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = str(cause).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1].strip()[:200]}" if lines else type(error).__name__


# Errors of a launch after which the same process can go on; any other "CUDA error" loses the context.
_HARMLESS = ("invalid argument", "invalid configuration", "too many resources requested", "no kernel image")


def device_is_lost(error: BaseException) -> bool:
    """Whether the GPU's context is lost, for example by an illegal access; no later call of this process succeeds."""
    text = str(error)
    lost = "CUDA error" in text or "HIP error" in text or "illegal memory access" in text
    return lost and not any(harmless in text for harmless in _HARMLESS)


@contextmanager
def only(op: str, candidate: str) -> Iterator[None]:
    """Inside this context every call of `op` in this thread runs `candidate`, without a replacement."""
    previous = getattr(_only, "names", {})
    _only.names = {**previous, op: candidate}
    try:
        yield
    finally:
        _only.names = previous


def forget() -> None:
    """Forget what failed and what was said."""
    _failed.clear()
    _said.clear()
