"""Seeing every op that the models call, with its arguments, while a pipeline runs."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastsd import kernels
from fastsd.kernels.cpu import onednn

IN_PLACE = {"advance": ("x", "x_in", "saved", "history", "noise")}  # ops that return nothing, and what they change
FIRST = {"flash_attn": "q"}  # the argument that shows an op's size; x elsewhere


@dataclass(frozen=True)
class Op:
    """What the models call."""

    name: str
    run: Callable[..., Any]


@functools.cache
def ops() -> dict[str, Op]:
    """Every op in `fastsd.kernels`: each function that stands beside its `<op>_ref`."""
    found = {}
    for module in pkgutil.iter_modules(kernels.__path__):
        if module.ispkg:
            continue
        room = importlib.import_module(f"{kernels.__name__}.{module.name}")
        for name, reference in vars(room).items():
            stem = name.removesuffix("_ref")
            if stem != name and getattr(reference, "__module__", "") == room.__name__ and hasattr(room, stem):
                found[stem] = Op(stem, getattr(room, stem))
    return found


def has_kernel(op: str) -> bool:
    """Whether a Triton kernel computes `op`, at least in part."""
    return importlib.util.find_spec(f"{kernels.__name__}.triton.{op}") is not None


@dataclass(frozen=True)
class Call:
    """One call of an op.

    Attributes:
        op: what was called.
        arguments: by name, defaults filled in. Tensors are the caller's own.
        key: equal for calls that differ in nothing but the tensors' values.
    """

    op: Op
    arguments: dict[str, Any]
    key: tuple[Any, ...]

    @classmethod
    def of(cls, op: Op, *args: Any, **kwargs: Any) -> Call:
        bound = inspect.signature(op.run).bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        return cls(op, arguments, (op.name, *((name, _kind(value)) for name, value in arguments.items())))

    @property
    def shape(self) -> str:
        """The sizes of its tensors, for a reader: "2x64x64x320 w320x320x3x3"."""
        parts = []
        for name in (FIRST.get(self.op.name, "x"), "skip", "weight", "k", "residual"):
            tensor = self.arguments.get(name)
            if isinstance(tensor, torch.Tensor) and (tensor.ndim > 1 or name == "x"):
                sizes = "x".join(map(str, tensor.shape))
                parts.append(
                    {"weight": "w", "k": "k", "skip": "+"}.get(name, "") + sizes if name != "residual" else "+r"
                )
        extra = [name for name in ("causal", "silu", "add", "activation") if _is_set(self.arguments.get(name))]
        return " ".join(parts + [str(self.arguments[n]) if n == "activation" else n for n in extra])

    def run(self, arguments: dict[str, Any] | None = None) -> tuple[torch.Tensor, ...]:
        """The op's results, of `arguments` or the call's own; tensors that it changes in place are copied first."""
        arguments = dict(self.arguments if arguments is None else arguments)
        changed = IN_PLACE.get(self.op.name, ())
        arguments |= {name: arguments[name].clone() for name in changed}
        result = self.op.run(**arguments)
        if changed:
            return tuple(arguments[name] for name in changed)
        return result if isinstance(result, tuple) else (result,)

    def kept(self) -> Call:
        """The call as it is now, for ops that work in place: their callers change the tensors afterwards."""
        if self.op.name not in IN_PLACE:
            return self
        copies = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in self.arguments.items()}
        return replace(self, arguments=copies)

    def widened(self) -> dict[str, Any]:
        """The arguments with every floating-point tensor in float64."""
        return {
            name: onednn.dense(value).double()
            if isinstance(value, torch.Tensor) and value.is_floating_point()
            else value
            for name, value in self.arguments.items()
        }


def _is_set(value: Any) -> bool:
    return value not in (None, False, "none") if not isinstance(value, torch.Tensor) else True


def _kind(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    strides = () if value.is_mkldnn else value.stride()
    return tuple(value.shape), strides, value.dtype, value.is_mkldnn


@contextmanager
def watched(see: Callable[[Call], Any]) -> Iterator[None]:
    """Inside this context `see` is told of every call that fastsd's modules make of an op, before it is done.

    What ops call among themselves, and what `see` calls, is not told. Not for programs with other threads at work:
    the names that modules hold are replaced for the time being.
    """
    inside = False

    def replacement(op: Op) -> Callable[..., Any]:
        @functools.wraps(op.run)
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            if inside:
                return op.run(*args, **kwargs)
            inside = True
            try:
                see(Call.of(op, *args, **kwargs))
                return op.run(*args, **kwargs)
            finally:
                inside = False

        return run

    watchers = {op.run: replacement(op) for op in ops().values()}
    places = [
        (module, name, value)
        for module_name, module in list(sys.modules.items())
        if module_name.startswith("fastsd.") and module_name != __name__
        for name, value in list(vars(module).items())
        if inspect.isfunction(value) and value in watchers
    ]
    try:
        for module, name, value in places:
            setattr(module, name, watchers[value])
        yield
    finally:
        for module, name, value in places:
            setattr(module, name, value)
