"""Observe every op that the models call, with its arguments, while a pipeline runs."""

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

IN_PLACE = {
    "advance": ("x", "x_in", "saved", "history", "noise")
}  # ops that return nothing, and the arguments they modify
SIZE_ARGUMENT = {"flash_attn": "q"}  # the argument that shows the size of an op; x by default


@dataclass(frozen=True)
class Op:
    """A function of `fastsd.kernels` that the models call."""

    name: str
    run: Callable[..., Any]


@functools.cache
def ops() -> dict[str, Op]:
    """Every op in `fastsd.kernels`: each function with an `<op>_ref` in the same module."""
    by_name = {}
    for info in pkgutil.iter_modules(kernels.__path__):
        if info.ispkg:
            continue
        module = importlib.import_module(f"{kernels.__name__}.{info.name}")
        for name, reference in vars(module).items():
            stem = name.removesuffix("_ref")
            if stem != name and getattr(reference, "__module__", "") == module.__name__ and hasattr(module, stem):
                by_name[stem] = Op(stem, getattr(module, stem))
    return by_name


def has_kernel(op: str) -> bool:
    """Whether a Triton kernel computes `op`, at least in part."""
    return importlib.util.find_spec(f"{kernels.__name__}.triton.{op}") is not None


@dataclass(frozen=True)
class Call:
    """One call of an op.

    Attributes:
        op: the op that was called.
        arguments: by name, including defaults. Tensors are the caller's, not copies.
        key: equal for calls that differ only in the values of their tensors.
    """

    op: Op
    arguments: dict[str, Any]
    key: tuple[Any, ...]

    @classmethod
    def bind(cls, op: Op, *args: Any, **kwargs: Any) -> Call:
        bound = inspect.signature(op.run).bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        return cls(op, arguments, (op.name, *((name, _kind(value)) for name, value in arguments.items())))

    @property
    def shape(self) -> str:
        """The sizes of the tensors, for the report: "2x64x64x320 w320x320x3x3"."""
        parts = []
        for name in (SIZE_ARGUMENT.get(self.op.name, "x"), "skip", "weight", "k", "residual"):
            tensor = self.arguments.get(name)
            if isinstance(tensor, torch.Tensor) and (tensor.ndim > 1 or name == "x"):
                sizes = "x".join(map(str, tensor.shape))
                parts.append(
                    {"weight": "w", "k": "k", "skip": "+"}.get(name, "") + sizes if name != "residual" else "+r"
                )
        extra = [name for name in ("causal", "silu", "add", "activation") if _is_set(self.arguments.get(name))]
        return " ".join(parts + [str(self.arguments[n]) if n == "activation" else n for n in extra])

    def run(self, arguments: dict[str, Any] | None = None) -> tuple[torch.Tensor, ...]:
        """Run the op on `arguments` (default: the call's own). Tensors that it modifies in place are copied first."""
        arguments = dict(self.arguments if arguments is None else arguments)
        modified = IN_PLACE.get(self.op.name, ())
        arguments |= {name: arguments[name].clone() for name in modified}
        output = self.op.run(**arguments)
        if modified:
            return tuple(arguments[name] for name in modified)
        return output if isinstance(output, tuple) else (output,)

    def snapshot(self) -> Call:
        """The call, with copies of tensors that an op in place modifies."""
        if self.op.name not in IN_PLACE:
            return self
        copies = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in self.arguments.items()}
        return replace(self, arguments=copies)

    def widened(self) -> dict[str, Any]:
        """The arguments, with every floating-point tensor in float64."""
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
def observed(on_call: Callable[[Call], Any]) -> Iterator[None]:
    """Inside this context `on_call` receives every op call of fastsd's modules, before it runs.

    Calls between ops, and calls by `on_call` itself, are not observed. Not thread-safe: the context replaces the ops in
    the namespaces of the modules.
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
                on_call(Call.bind(op, *args, **kwargs))
                return op.run(*args, **kwargs)
            finally:
                inside = False

        return run

    replacements = {op.run: replacement(op) for op in ops().values()}
    bindings = [
        (module, name, value)
        for module_name, module in list(sys.modules.items())
        if module_name.startswith("fastsd.") and module_name != __name__
        for name, value in list(vars(module).items())
        if inspect.isfunction(value) and value in replacements
    ]
    try:
        for module, name, value in bindings:
            setattr(module, name, replacements[value])
        yield
    finally:
        for module, name, value in bindings:
            setattr(module, name, value)
