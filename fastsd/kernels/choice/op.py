"""An op with its candidates, the ways to run them, and the key of a call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Key = tuple[Any, ...]  # by which a call is known: what may decide which candidate is fastest


def _none(*_: Any) -> None:
    return None


@dataclass(frozen=True, eq=False)
class OpCandidate:
    """One way to compute an op.

    Attributes:
        name: unique within the op: "triton" for our kernel, "torch" for PyTorch's own op.
        run: computes the op; it has all arguments of the op, in their order, and `launch=` where there are `launches`.
        refuses: of the same arguments: None, or the reason why this candidate does not take them.
        partial: it is made for some calls only, so that a refusal is nothing to tell.
        launches: of `thorough` and the same arguments: launches of our kernel to choose from, the committed one first;
            a few, or all that may be worth a trial.
        launch_types: the classes of those launches, by which a table on disk is read.
        measured: it is used only where it was measured to be the fastest. A library may refuse such a call; that is
            nothing to tell either.
        tuned: it is tried by `fastsd tune` alone, so that a first use stays short.
    """

    name: str
    run: Callable[..., Any]
    refuses: Callable[..., str | None] = _none
    partial: bool = False
    launches: Callable[..., Sequence[Any]] | None = None
    launch_types: tuple[type, ...] = ()
    measured: bool = False
    tuned: bool = False


@dataclass(frozen=True)
class Way:
    """A candidate and its launch; None is the committed launch, or there is none to choose."""

    candidate: OpCandidate
    launch: Any = None

    def run(self, args: Sequence[Any]) -> Any:
        """Compute a call."""
        return self.candidate.run(*args) if self.launch is None else self.candidate.run(*args, launch=self.launch)

    @property
    def label(self) -> str:
        """The way in one line: "triton RowwiseLaunch(block_rows=4, ...)"."""
        return self.candidate.name if self.launch is None else f"{self.candidate.name} {self.launch}"


GPU_OPS: dict[str, GpuOp] = {}  # by name, once their modules are imported


@dataclass(frozen=True, eq=False)
class GpuOp:
    """An op with its candidates, in the order of preference where none is measured.

    Attributes:
        name: of the function in `fastsd.kernels`.
        reference: its specification, of the same arguments.
        candidates: the last one is PyTorch's own, and takes every call.
        in_place: positions of the arguments that the op modifies; no candidate modifies another.
        first: of the same arguments: the name of the candidate that is preferred for them where none is measured; None:
            the order decides.
        unkeyed: positions of arguments whose sizes change nothing, such as a table of which one row is read.
    """

    name: str
    reference: Callable[..., Any]
    candidates: tuple[OpCandidate, ...]
    in_place: tuple[int, ...] = ()
    first: Callable[..., str | None] = _none
    unkeyed: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        GPU_OPS[self.name] = self

    def in_order(self, args: Sequence[Any]) -> list[OpCandidate]:
        """The candidates in the order of preference for these arguments."""
        first = self.first(*args)
        return sorted(self.candidates, key=lambda candidate: candidate.name != first)

    @property
    def own(self) -> Way:
        """PyTorch's own op."""
        return Way(self.candidates[-1])

    def candidate(self, name: str) -> OpCandidate | None:
        """The candidate of that name."""
        return next((candidate for candidate in self.candidates if candidate.name == name), None)

    def key_of(self, args: Sequence[Any]) -> Key:
        """The key of a call."""
        return tuple([None if i in self.unkeyed else _kind(x) for i, x in enumerate(args)])

    def copied(self, args: Sequence[Any]) -> list[Any]:
        """The arguments, with copies of those that the op modifies."""
        return [x.clone() if i in self.in_place else x for i, x in enumerate(args)]

    def outputs(self, way: Way, args: Sequence[Any]) -> tuple[torch.Tensor, ...]:
        """What a way computes; the arguments stay as they are."""
        args = self.copied(args)
        result = way.run(args)
        if self.in_place:
            return tuple(args[i] for i in self.in_place)
        return result if isinstance(result, tuple) else (result,)


def _kind(x: Any) -> Any:
    """What of an argument may decide which candidate is fastest: sizes, strides and dtype, or a value but a float."""
    if isinstance(x, tuple):
        return tuple([_kind(part) for part in x])
    if isinstance(x, torch.Tensor):
        return (x.dtype, x.shape) if x.is_contiguous() else (x.dtype, x.shape, x.stride())
    return float if isinstance(x, float) else x


def key_text(key: Key) -> str:
    """A key as one line: "float16 2x64x64x320, float16 320x320x3x3 strides 2880x1x960x320, -, 1"."""
    return ", ".join(map(_kind_text, key))


def _kind_text(kind: Any) -> str:
    if isinstance(kind, tuple) and kind and isinstance(kind[0], torch.dtype):
        dtype, *sizes = kind
        parts = ["x".join(map(str, numbers)) for numbers in sizes]
        return f"{str(dtype)[6:]} {' strides '.join(parts)}"
    if isinstance(kind, tuple):
        return f"({', '.join(map(_kind_text, kind))})"
    if kind is float:
        return "float"
    return "-" if kind is None else str(kind)


def encoded(args: Sequence[Any]) -> list[Any]:
    """Arguments as JSON, without the contents of tensors."""
    return [
        {"dtype": str(x.dtype)[6:], "shape": list(x.shape), "strides": list(x.stride())}
        if isinstance(x, torch.Tensor)
        else {"tuple": encoded(x)}
        if isinstance(x, tuple)
        else x
        for x in args
    ]


def decoded(values: Sequence[Any], device: torch.device | str) -> list[Any]:
    """Arguments from JSON; tensors hold random numbers, always the same ones."""
    generator = torch.Generator(device="cpu").manual_seed(0)

    def made(x: Any) -> Any:
        if isinstance(x, dict) and "tuple" in x:
            return tuple([made(part) for part in x["tuple"]])
        if not isinstance(x, dict):
            return x
        extent = 1 + sum((size - 1) * step for size, step in zip(x["shape"], x["strides"]))
        dtype: torch.dtype = getattr(torch, x["dtype"])
        if 0 in x["shape"]:
            return torch.empty(x["shape"], dtype=dtype, device=device)
        if not dtype.is_floating_point:
            return torch.zeros(extent, dtype=dtype, device=device).as_strided(x["shape"], x["strides"])
        # Few numbers are drawn, and repeated: a generator on the CPU draws the same ones on every machine.
        count = min(extent, 2**20 - 3)
        drawn = torch.randn(count, generator=generator, dtype=torch.float32, device="cpu").to(device, dtype)
        return drawn.repeat(-(-extent // len(drawn)))[:extent].as_strided(x["shape"], x["strides"])

    return [made(x) for x in values]
