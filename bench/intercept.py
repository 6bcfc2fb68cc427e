"""Launches of Triton kernels, recorded instead of made: the one place where this repository stands between the two."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from bench.compiled import Compiled, Unaligned, compile_kernel
from fastsd.kernels.launch import architecture

OnLaunch = Callable[[Any, dict[str, Any]], None]  # gets a kernel, and its arguments and compiler options by name


@dataclass(frozen=True)
class KernelLaunch:
    """A kernel and the arguments of a launch: dtypes in place of tensors, numbers, constants, compiler options."""

    case: str
    kernel: Any
    arguments: dict[str, Any]

    def compiled(self, capability: int) -> Compiled:
        """Compile it for sm_`capability`."""
        options = {name: self.arguments[name] for name in ("num_stages", "maxnreg") if self.arguments.get(name)}
        return compile_kernel(self.kernel, capability, self.arguments.get("num_warps", 4), self.arguments, **options)


@contextmanager
def intercepted(on_launch: OnLaunch) -> Iterator[None]:
    """Inside this context the launches of all kernels go to `on_launch`, with their tensors."""

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        on_launch(kernel, dict(zip((parameter.name for parameter in kernel.params), args)) | options)

    with patch.object(triton.JITFunction, "run", run):
        yield


@contextmanager
def intercepted_launches(capability: int, on_launch: OnLaunch) -> Iterator[None]:
    """The same, with what the compiler is given of tensors, while every device has this compute capability."""
    key = architecture.class_of_capability(capability)

    def tell(kernel: Any, arguments: dict[str, Any]) -> None:
        on_launch(kernel, without_memory(arguments))

    with patch.object(architecture, "class_of", lambda device: key), intercepted(tell):
        yield


def without_memory(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a launch without its tensors, which would stay in memory."""
    return {name: _without_memory(x) for name, x in arguments.items()}


def _without_memory(x: Any) -> Any:
    if isinstance(x, TensorDescriptor):
        return replace(x, base=torch.empty(0, dtype=x.base.dtype, device="meta"))
    if not isinstance(x, torch.Tensor):
        return x
    return x.dtype if x.storage_offset() * x.element_size() % 16 == 0 else Unaligned(x.dtype)
