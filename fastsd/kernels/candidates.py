"""The candidates of an op under the backend `triton`: our kernels and PyTorch's own ops, of which one computes a call.

Which one is decided at the first call of a GPU, an op and a key (`fastsd.kernels.choice.decide`). A candidate that
fails later is replaced, said once by its name, and not tried again for this key. The last candidate of each op is
PyTorch's own op.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fastsd.cuda.capture import ran_out_of_memory
from fastsd.errors import FastsdError
from fastsd.kernels import dispatch
from fastsd.kernels.choice import decide
from fastsd.kernels.choice.decide import ChoiceMode, choosing
from fastsd.kernels.choice.faults import device_is_lost, installation_is_incomplete, reason_of
from fastsd.kernels.choice.op import GpuOp, OpCandidate, Way

__all__ = ["ChoiceMode", "GpuOp", "OpCandidate", "choosing", "chosen", "forget", "only", "run"]

_only = threading.local()
_chosen: dict[tuple[Any, ...], Way] = {}  # by device, mode, op and key
_failed: dict[tuple[Any, ...], dict[str, str]] = {}  # the same: reasons by way


def run(op: GpuOp, *args: Any) -> Any:
    """Compute a call by a candidate of `op` that takes it.

    Args:
        args: all arguments of the op, positional; the first is a tensor on the op's device.

    Raises:
        FastsdError: the backend `triton` is forced, and our kernel does not take the call; or the candidate of `only`
            does not.
        Exception: what the first candidate raised, if all fail; what any raises if memory or the GPU itself is lost.
    """
    stated = _stated(op, args)
    if stated is not None:
        return stated.run(args)
    place = _place_of(op, args)
    error: Exception | None = None
    while True:
        way = _decided(op, args, place)
        try:
            result = way.run(args)
        except FastsdError:
            raise
        except Exception as fault:
            if ran_out_of_memory(fault):
                raise
            if device_is_lost(fault) or way == op.own:
                raise error or fault from None
            if way.candidate.refuses(*args) is not None:  # for what is no part of the key, such as where in memory x is
                return op.own.run(args)
            if installation_is_incomplete(fault):  # for this process alone: what is missing may be installed
                decide.tell_incomplete(fault)
                _chosen[place] = op.own
                continue
            error = error or fault
            _failed.setdefault(place, {})[way.label] = reason_of(fault)
            _chosen.pop(place, None)
            continue
        if error is not None:
            _tell(op, _failed[place], way)
        return result


def chosen(op: GpuOp, *args: Any) -> Way:
    """The way in which `run` would begin to compute a call; nothing is computed here but what the choice needs.

    Raises:
        FastsdError: as `run`.
    """
    return _stated(op, args) or _decided(op, args, _place_of(op, args))


def _stated(op: GpuOp, args: Sequence[Any]) -> Way | None:
    """The way that `only` states, or the backend `triton` if it is forced."""
    named: Way | None = getattr(_only, "ways", {}).get(op.name)
    if named is not None:
        reason = named.candidate.refuses(*args)
        if reason is not None:
            raise FastsdError(f"{op.name}: candidate {named.candidate.name!r} does not take this call: {reason}")
        return named
    if dispatch.forced_name() == "triton":
        return next(Way(one) for one in decide.taking(op, args) if not one.measured)
    return None


def _place_of(op: GpuOp, args: Sequence[Any]) -> tuple[Any, ...]:
    how = decide.mode()
    return args[0].device, how.reproducible, how.thorough, op.name, op.key_of(args)


def _decided(op: GpuOp, args: Sequence[Any], place: tuple[Any, ...]) -> Way:
    way = _chosen.get(place)
    if way is None:
        way, stays = decide.way_for(op, place[-1], args, _failed.get(place, {}))
        if stays:
            _chosen[place] = way
    return way


def _tell(op: GpuOp, failed: dict[str, str], instead: Way) -> None:
    """Say once of each candidate that it failed."""
    for label, reason in failed.items():
        decide.say(
            f"{op.name}: candidate {label!r} fails on this machine ({reason}); {instead.label!r} computes it instead",
            op.name,
            label.partition(" ")[0],
        )


@contextmanager
def only(op: str, way: Way) -> Iterator[None]:
    """Inside this context every call of `op` in this thread runs this way, without a replacement."""
    previous = getattr(_only, "ways", {})
    _only.ways = {**previous, op: way}
    try:
        yield
    finally:
        _only.ways = previous


def forget() -> None:
    """Forget, in this process, what was chosen, what failed and what was said."""
    _chosen.clear()
    _failed.clear()
    decide.forget()
