"""How every Triton kernel is checked: the rule of precision.py, poisoned outputs, guard zones, broken copies of it.

Kernels run on CPU tensors in Triton's interpreter, which does not notice accesses out of bounds. So every buffer lies
between guard zones. Around inputs they hold NaN, so that a stray read makes a result NaN. Around what a launcher
allocates or a kernel changes in place they hold a number, so that a stray write, even of NaN, changes it.
"""

from __future__ import annotations

import importlib.util
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from pytest import MonkeyPatch
from torch.overrides import TorchFunctionMode

GUARD = 4096  # elements on either side: alignment is kept, and a broken kernel does not reach the heap
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
SENTINEL = 12345.0
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("contiguous", "offset", "gaps")
ALLOCATORS = (torch.empty, torch.empty_like, torch.Tensor.new_empty)

Outputs = torch.Tensor | Sequence[torch.Tensor]


class Guards(TorchFunctionMode):
    """Inside this context `torch.empty` and similar return NaN between guard zones, which `intact` checks."""

    def __init__(self) -> None:
        super().__init__()
        # Each buffer with a copy of its first contents and a mask of its writable part.
        self._buffers: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def _buffer(self, numel: int, dtype: torch.dtype, guard: float) -> torch.Tensor:
        fill = guard if dtype.is_floating_point else torch.iinfo(dtype).max
        if dtype == torch.float8_e4m3fn and not math.isnan(fill):
            fill = min(fill, torch.finfo(dtype).max)
        return torch.full((numel + 2 * GUARD,), fill, dtype=dtype, device=DEVICE)

    def _register(self, buffer: torch.Tensor, view: torch.Tensor) -> torch.Tensor:
        free = torch.zeros_like(buffer, dtype=torch.bool)
        free.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(True)
        self._buffers.append((buffer, buffer.clone(), free))
        return view

    def place(self, x: torch.Tensor, layout: str = "contiguous", guard: float = math.nan) -> torch.Tensor:
        """A copy of `x` between guard zones.

        layout: "contiguous"; "offset" by one element, so that no vector is aligned; "gaps" of three guard elements
        after each row of the last dimension.
        """
        shape = [*x.shape[:-1], x.shape[-1] + (3 if layout == "gaps" and x.ndim > 1 else 0)]
        start = GUARD + (1 if layout == "offset" else 0)
        numel = math.prod(shape)
        buffer = self._buffer(numel + 1, x.dtype, guard)
        view = buffer[start : start + numel].view(shape)[..., : x.shape[-1]]
        view.copy_(x)
        return self._register(buffer, view)

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in ALLOCATORS or result.numel() == 0:
            return result
        buffer = self._buffer(result.numel(), result.dtype, SENTINEL)
        view = buffer[GUARD : GUARD + result.numel()].view(result.shape)
        return self._register(buffer, view.fill_(math.nan) if result.is_floating_point() else view)

    def intact(self) -> None:
        """Assert that no guard zone was written to."""
        for buffer, before, free in self._buffers:
            size = buffer.element_size()
            same = buffer.view(torch.uint8).view(-1, size) == before.view(torch.uint8).view(-1, size)
            assert bool((same.all(1) | free).all()), "a write outside a buffer"


def check(
    op: Callable[..., Outputs],
    plain: Callable[..., Outputs],
    *inputs: torch.Tensor | None,
    layout: str = "contiguous",
) -> None:
    """Assert max|op - truth| <= 2 max|plain - truth| + 1 ulp of the largest value, for each output.

    Args:
        op: the kernel's launcher. It gets copies of `inputs` between guard zones, which it must not change.
        plain: the same function in a few public PyTorch operations; in float64, the truth.
        inputs: tensors in the dtype that both compute in.
        layout: of inputs with more than one dimension, see `Guards.place`.
    """
    guards = Guards()
    placed = [None if x is None else guards.place(x, layout if x.ndim > 1 else "contiguous") for x in inputs]
    with guards:
        results = op(*placed)
    guards.intact()
    for before, after in zip(inputs, placed):
        assert before is None or after is None or _same(before, after.cpu()), "an input was changed"
    compare(results, plain, *inputs)


def _same(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether two tensors hold the same values, NaN where NaN."""
    return x.shape == y.shape and bool(((x == y) | ((x != x) & (y != y))).all())


def compare(results: Outputs, plain: Callable[..., Outputs], *inputs: torch.Tensor | None) -> None:
    """Apply the rule of `check` to `results`."""
    results = _tuple(results)
    same_dtype = _tuple(plain(*(None if x is None else x.clone() for x in inputs)))
    truths = _tuple(plain(*(x.double() if x is not None and x.is_floating_point() else x for x in inputs)))
    assert len(results) == len(truths)
    for result, same, truth in zip(results, same_dtype, truths):
        assert result.shape == truth.shape and result.dtype == same.dtype
        # The interpreter truncates to bf16 where a device rounds: up to one ulp more.
        ulps = 2 if INTERPRETED and result.dtype == torch.bfloat16 else 1
        allowed = 2 * (same.double() - truth).abs().max().item()
        allowed += ulps * truth.abs().max().item() * torch.finfo(result.dtype).eps
        assert bool(result.isfinite().all()), "a poisoned or non-finite result"
        distance = (result.cpu().double() - truth).abs().max().item()
        assert distance <= allowed, f"{distance:.3g} from the truth, where {allowed:.3g} is allowed"


def _tuple(outputs: Outputs) -> tuple[torch.Tensor, ...]:
    return (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)


def interpreted_bf16_products(monkeypatch: MonkeyPatch, *modules: Any) -> None:
    """Let the interpreter multiply bf16 values, which it keeps as 16-bit integers, and `modules` take them."""
    if not INTERPRETED:
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    original = InterpreterBuilder.create_dot

    def widened(x: Any) -> Any:
        if x.data.dtype != np.uint16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    monkeypatch.setattr(
        InterpreterBuilder, "create_dot", lambda self, a, b, *rest: original(self, widened(a), widened(b), *rest)
    )
    for module in modules:
        monkeypatch.setattr(module, "DTYPES", (*module.DTYPES, torch.bfloat16))


def broken_with_importers(
    module: ModuleType, old: str, new: str, importers: Sequence[ModuleType], folder: Path, monkeypatch: MonkeyPatch
) -> Any:
    """A copy of the last of `importers` that uses a copy of `module` in which `old` reads `new`.

    importers: modules that import `module` or one another, each after those that it imports. Without any, the broken
    copy itself.
    """
    for i, loaded in enumerate((module, *importers)):
        copy = broken(loaded, *((old, new) if i == 0 else ("", "")), folder, f"broken_{i}")
        monkeypatch.setitem(sys.modules, loaded.__name__, copy)
    return copy


def broken(module: ModuleType, old: str, new: str, folder: Path, name: str = "broken") -> Any:
    """A copy of `module` in which the text `old` reads `new`. `old` must be there."""
    source = Path(str(module.__file__)).read_text(encoding="utf-8")
    assert old in source, f"{module.__name__} has no {old!r} to break"
    file = folder / f"{name}.py"
    file.write_text(source.replace(old, new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    copy: Any = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = copy  # a dataclass looks for its module there
    try:
        spec.loader.exec_module(copy)
    finally:
        del sys.modules[spec.name]
    return copy


@contextmanager
def must_fail() -> Iterator[None]:
    """Assert that the checks in this block notice a broken kernel."""
    try:
        yield
    except AssertionError:
        return
    raise RuntimeError("the checks did not notice")


def rand(*shape: int, dtype: torch.dtype, scale: float = 1.0, mean: float = 0.0, seed: int = 0) -> torch.Tensor:
    """Normal numbers, the same in every run."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(*shape, generator=generator) * scale + mean).to(dtype)
