"""Candidates that libraries compute: what they are asked, that they are right, and that they may refuse or be wrong.

The libraries are played by PyTorch's own operations on the CPU, our kernels beside them by the specification.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="no Triton for this platform")

from fastsd.cuda import blas
from fastsd.kernels import candidates
from fastsd.kernels.candidates import ChoiceMode, choosing
from fastsd.kernels.choice import decide
from fastsd.kernels.choice.check import Checker
from fastsd.kernels.choice.op import GPU_OPS, GpuOp, Way, key_text
from fastsd.kernels.conv2d import OP as CONV2D
from fastsd.kernels.geglu import OP as GEGLU
from fastsd.kernels.geglu_fp8 import OP as GEGLU_FP8
from fastsd.kernels.linear import OP as LINEAR
from fastsd.kernels.linear_fp8 import OP as LINEAR_FP8
from fastsd.kernels.linear_fp8 import quantize
from fastsd.kernels.triton import add_bias_residual as add_bias_residual_triton
from fastsd.kernels.triton import geglu as geglu_triton
from fastsd.kernels.triton import linear_fp8 as linear_fp8_triton
from tests.support.played_gpu import PlayedGpu, played, restart
from tests.support.precision import rand
from tests.support.told import told

HALF = torch.float16
SAME = (1, 1, 1, 1)


class Libraries(PlayedGpu):
    """A GPU whose libraries answer a call as PyTorch does on the CPU, or with `fault`, or wrongly; and how they were
    asked. What they compute takes a tenth of other calls' time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fault: Exception | None = None
        self.wrong = False
        self.asked: list[Any] = []

    def answer(self, about: Any, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        self.asked.append(about)
        self.takes = 1e-6
        if self.fault is not None:
            raise self.fault
        y = compute()
        return y + y.abs().max() if self.wrong else y

    def sampler(self, run: Callable[[], Any]) -> Callable[[], float]:
        def reset_and_run() -> None:
            self.takes = 1e-5
            run()

        return super().sampler(reset_and_run)


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Libraries]:
    gpu, scaled_mm, linear = Libraries(), torch._scaled_mm, F.linear
    preferred: list[str] = []

    def convolution(x: Any, w: Any, padding: Any, stride: Any, dilation: Any, groups: int, *flags: bool) -> Any:
        return gpu.answer(flags[:2], lambda: torch.conv2d(x, w, None, stride, padding, dilation, groups))

    @contextmanager
    def prefer(library: str) -> Iterator[None]:
        preferred.append(library)
        try:
            yield
        finally:
            preferred.pop()

    def product(*args: Any) -> torch.Tensor:
        return gpu.answer(preferred[-1], lambda: linear(*args)) if preferred else linear(*args)

    def finish(y: Any, bias: Any, residual: Any, relu: bool) -> torch.Tensor:
        for x in (bias, residual):
            y = y if x is None else y + x
        return y.relu() if relu else y

    def gate(y: torch.Tensor, bias: torch.Tensor, launch: Any = None) -> torch.Tensor:
        value, gate = (y + bias).chunk(2, dim=-1)
        return value * F.gelu(gate)

    def quantize_rows(x: torch.Tensor, skip: torch.Tensor | None = None) -> Any:
        values, scales = quantize(x if skip is None else torch.cat([x, skip], -1))
        return values, scales.flatten()

    monkeypatch.setattr(torch.ops.aten, "cudnn_convolution", convolution)
    monkeypatch.setattr(torch, "_scaled_mm", lambda *a, **k: gpu.answer(a[2].shape, lambda: scaled_mm(*a, **k)))
    monkeypatch.setattr(blas, "preferred", prefer)
    monkeypatch.setattr(F, "linear", product)
    monkeypatch.setattr(add_bias_residual_triton, "add_bias_residual", finish)
    monkeypatch.setattr(geglu_triton, "geglu_gate", gate)
    monkeypatch.setattr(linear_fp8_triton, "quantize", quantize_rows)
    monkeypatch.setattr(linear_fp8_triton, "DTYPES", (torch.float16, torch.bfloat16))
    with played(tmp_path, gpu, monkeypatch), choosing(ChoiceMode(probe=False, thorough=True)):
        yield gpu


@dataclass(frozen=True)
class LibraryCall:
    """A call that a library's candidate takes, and how the library is asked for it."""

    op: GpuOp
    candidate: str
    args: Callable[[], tuple[Any, ...]]
    asked: Any


def weight_fp8(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    return quantize(rand(rows, columns, dtype=torch.bfloat16, seed=1))


def rows(*shape: int, dtype: torch.dtype = HALF, seed: int = 0) -> torch.Tensor:
    return rand(*shape, dtype=dtype, seed=seed)


BF16 = {"dtype": torch.bfloat16}
CALLS = {
    "conv2d, first plan": LibraryCall(
        CONV2D,
        "cudnn, first plan",
        lambda: (rows(1, 6, 5, 8), rows(16, 8, 3, 3, seed=1), rows(16, seed=2), 1, SAME, rows(1, 6, 5, 16), True),
        (False, True),  # no search of its own; sums in a fixed order
    ),
    "conv2d of two sides and 3 channels, first plan": LibraryCall(
        CONV2D,
        "cudnn, first plan",
        lambda: (rows(1, 6, 6, 3), rows(8, 3, 3, 3, seed=1), None, 2, (0, 1, 0, 1), None, False),
        (False, True),
    ),
    "linear": LibraryCall(
        LINEAR, "cublaslt", lambda: (rows(2, 5, 16), rows(24, 16, seed=1), None, "silu", None, None), "cublaslt"
    ),
    "geglu": LibraryCall(
        GEGLU, "cublaslt, then triton", lambda: (rows(6, 16), rows(32, 16, seed=1), rows(32, seed=2)), "cublaslt"
    ),
    "linear_fp8": LibraryCall(
        LINEAR_FP8,
        "cublaslt",
        lambda: (
            *(rows(2, 5, 32, **BF16), *weight_fp8(16, 48), rows(16, seed=2, **BF16), "silu"),
            *(rows(2, 5, 16, seed=3, **BF16), rows(2, 5, 16, seed=4, **BF16)),
        ),
        (10, 1),  # a scale for each row
    ),
    "geglu_fp8": LibraryCall(
        GEGLU_FP8,
        "cublaslt, then triton",
        lambda: (rows(6, 32, **BF16), *weight_fp8(32, 32), rows(32, seed=2, **BF16)),
        (6, 1),
    ),
}


def op_with(call: LibraryCall, monkeypatch: pytest.MonkeyPatch) -> GpuOp:
    """The op with this candidate and PyTorch's own alone."""
    monkeypatch.setitem(GPU_OPS, call.op.name, call.op)
    candidate = call.op.candidate(call.candidate)
    assert candidate is not None and candidate.measured
    return replace(call.op, candidates=(candidate, call.op.candidates[-1]))


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_it_is_right_and_used_where_it_is_faster(
    call: LibraryCall, gpu: Libraries, monkeypatch: pytest.MonkeyPatch
) -> None:
    op, args = op_with(call, monkeypatch), call.args()
    result = candidates.run(op, *args)
    entry = decide.gpu_of(result.device).table.entries[op.name, key_text(op.key_of(args))]
    assert entry.candidate == call.candidate and not entry.excluded
    assert set(gpu.asked) == {call.asked}
    assert torch.equal(result, op.candidates[0].run(*args)) and result.is_contiguous()


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_its_refusal_is_noted_and_nothing_to_tell(
    call: LibraryCall, gpu: Libraries, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu.fault = RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED when calling this, or no engine was found")
    op, args = op_with(call, monkeypatch), call.args()
    assert torch.equal(candidates.run(op, *args), op.own.run(args))  # a warning would be an error
    entry = decide.gpu_of(args[0].device).table.entries[op.name, key_text(op.key_of(args))]
    assert entry.candidate == "torch" and "NOT_SUPPORTED" in entry.excluded[call.candidate]


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_wrong_result_is_told_and_never_used(
    call: LibraryCall, gpu: Libraries, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu.wrong = True
    op, args = op_with(call, monkeypatch), call.args()
    with told(match=f"{op.name}: candidate '{call.candidate}' is excluded: it is wrong"):
        assert torch.equal(candidates.run(op, *args), op.own.run(args))


def test_it_is_not_used_where_nothing_is_measured(gpu: Libraries, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "measures", lambda x: False)
    for call in CALLS.values():
        candidates.run(op_with(call, monkeypatch), *call.args())
    assert not gpu.asked


def test_a_first_use_tries_fp8_alone(gpu: Libraries, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are for `tune`, whose choice stays: its table says what computes a call."""
    for call in CALLS.values():
        gpu.asked.clear()
        with choosing(ChoiceMode(probe=False)):
            candidates.run(op_with(call, monkeypatch), *call.args())
        assert bool(gpu.asked) == call.op.name.endswith("fp8")
        candidates.run(op_with(call, monkeypatch), *call.args())  # tuning
        assert gpu.asked
        restart()
        gpu.asked.clear()
        with choosing(ChoiceMode(probe=False)):
            candidates.run(op_with(call, monkeypatch), *call.args())
        assert gpu.asked == [call.asked]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 8.0])
def test_pytorchs_own_way_of_fp8_computes_with_the_same_numbers(dtype: torch.dtype, scale: float) -> None:
    """In 16 bits. The product rounds once, a residual once more; value, gate, GELU and their product once each, where
    an error of the gate grows by GELU's slope, below 1.13. Sums of 48 products in fp32 round by less than that."""
    x, (weight, scales) = rand(2, 5, 48, dtype=torch.float64) * scale, weight_fp8(32, 48)
    x, bias = x.to(dtype), rows(32, dtype=dtype, seed=2) * scale
    residual = rows(2, 5, 32, dtype=dtype, seed=3) * scale
    product = LINEAR_FP8.reference(x.double(), weight, scales, bias)
    unit, least = torch.finfo(dtype).eps / 2, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    found = LINEAR_FP8.own.run((x, weight, scales, bias, "none", residual, None))
    largest = product.abs().max() + residual.abs().max()
    assert found.dtype == dtype and (found - (product + residual)).abs().max() <= 3 * unit * largest + 2 * least
    value, gate = product.chunk(2, dim=-1)
    found = GEGLU_FP8.own.run((x, weight, scales, bias))
    largest = value.abs().max() * gate.abs().max()
    assert found.dtype == dtype and (found - value * F.gelu(gate)).abs().max() <= 5 * unit * largest + 2 * least


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_checker_finds_nothing_wrong_with_it(
    call: LibraryCall, gpu: Libraries, monkeypatch: pytest.MonkeyPatch
) -> None:
    op = op_with(call, monkeypatch)
    assert Checker(op, call.args()).fault(Way(op.candidates[0])) is None
