"""A call of an op: its arguments by name, so that it can be run again, in another precision, or described."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastsd.kernels.cpu import onednn

IN_PLACE = {  # ops that return nothing, and the arguments they modify
    "advance": ("x", "x_in", "saved", "history", "noise"),
    "add_product": ("total",),
}
SIZE_ARGUMENT = {"flash_attn": "q"}  # the argument that shows the size of an op; x by default


@dataclass(frozen=True)
class Op:
    """A function of `fastsd.kernels` that the models call, or its specification."""

    name: str
    run: Callable[..., Any]


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
        extra = [
            name
            for name in ("causal", "silu", "add", "ahead", "owed", "activation")
            if _is_set(self.arguments.get(name))
        ]
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

    def widened(self, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
        """The arguments, with every floating-point tensor in `dtype`."""
        return {name: _widened(value, dtype) for name, value in self.arguments.items()}


def _widened(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, tuple):
        return tuple([_widened(part, dtype) for part in value])
    is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
    return onednn.dense(value).to(dtype) if is_float else value


def _is_set(value: Any) -> bool:
    return value not in (None, False, "none") if not isinstance(value, torch.Tensor | tuple) else len(value) > 0


def _kind(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple([_kind(part) for part in value])
    if not isinstance(value, torch.Tensor):
        return value
    strides = () if value.is_mkldnn else value.stride()
    return tuple(value.shape), strides, value.dtype, value.is_mkldnn
