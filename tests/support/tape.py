"""A stand-in for CUDA graphs on the CPU: it repeats recorded operations on the same memory.

Like a graph, a tape does not see what the host did: numbers that it read while recording, tensors that it made
elsewhere, decisions. A tape keeps the arguments of each operation, runs the operation again, and copies the results
into the memory of the first run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
            raise RuntimeError(f"{func} reads a number from the device, which a graph cannot do")
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def play(self) -> None:
        for func, args, kwargs, first in self.operations:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(first), tree_leaves(again), strict=True):
                # Views and results of operations in place already share the old memory.
                if isinstance(old, torch.Tensor) and old.untyped_storage()._cdata != new.untyped_storage()._cdata:
                    old.copy_(new)


class TapeRecorder:
    """A `Recorder` of tapes. `recorded` counts captures; the next ones raise the errors in `fail`."""

    def __init__(self, fail: list[Exception] | None = None):
        self.recorded, self.waited, self.freed, self.fail = 0, 0, 0, list(fail or [])

    def record(self, function: Callable[[], T]) -> Callable[[], T]:
        if self.fail:
            raise self.fail.pop(0)
        function()  # the warm-up
        tape = _Tape()
        with tape:
            outputs = function()
        self.recorded += 1

        def replay() -> T:
            tape.play()
            return outputs

        return replay

    def wait(self) -> None:
        self.waited += 1

    def free(self) -> None:
        self.freed += 1
