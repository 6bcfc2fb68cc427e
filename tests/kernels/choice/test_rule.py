"""The verdicts of the rule, for known errors."""

from __future__ import annotations

import math

import pytest
import torch

from fastsd.kernels import dispatch
from fastsd.kernels.choice.rule import CheckResult, exact_arithmetic, judge, note_out_of_memory, wider

UNJUDGED = CheckResult("op", "op")
TRUTH = torch.tensor([1.0, -4.0, 2.0], dtype=torch.float64)
ULP = 4 * 2.0**-23  # of the largest number, in fp32


def off_by(*errors: float) -> tuple[torch.Tensor]:
    return ((TRUTH + torch.tensor(errors, dtype=torch.float64)).float(),)


@pytest.mark.parametrize(
    ("error", "torch_error", "slack", "passed"),
    [
        (0.0, 0.0, 0.0, True),
        (ULP, 0.0, 0.0, True),  # an ulp of the largest number
        (4 * ULP, 0.0, 0.0, False),
        (4 * ULP, 2 * ULP, 0.0, True),  # twice PyTorch's error
        (8 * ULP, 2 * ULP, 0.0, False),
        (8 * ULP, 2 * ULP, 4 * ULP, True),
    ],
)
def test_twice_pytorchs_error_and_an_ulp(error: float, torch_error: float, slack: float, passed: bool) -> None:
    result = judge(UNJUDGED, off_by(0, 0, error), off_by(0, -torch_error, 0), (TRUTH,), slack)
    assert result.passed is passed
    assert result.error == pytest.approx(error) and result.torch_error == pytest.approx(torch_error)


def test_nan_never_passes() -> None:
    assert judge(UNJUDGED, off_by(0, math.nan, 0), off_by(0, 0, 0), (TRUTH,)).passed is False


def test_a_finite_output_passes_where_pytorch_overflows() -> None:
    assert judge(UNJUDGED, off_by(0, 0, 1), off_by(0, math.inf, 0), (TRUTH,)).passed is True
    assert judge(UNJUDGED, off_by(0, 0, math.inf), off_by(0, math.inf, 0), (TRUTH,)).passed is None


def test_numbers_beyond_the_range_of_the_dtype_are_not_compared() -> None:
    truth = torch.tensor([1.0, 1e6], dtype=torch.float64)
    fast, plain = truth.half(), truth.half()
    result = judge(UNJUDGED, (fast,), (plain,), (truth,))
    assert result.passed and result.error == 0


def test_the_worst_of_several_outputs_is_reported() -> None:
    plain = off_by(0, ULP, 0) * 2
    result = judge(UNJUDGED, off_by(0, 0, 0) + off_by(0, 2 * ULP, 0), plain, (TRUTH, TRUTH))
    assert result.passed and result.error == pytest.approx(2 * ULP)
    assert judge(UNJUDGED, off_by(9, 0, 0) + off_by(0, 0, 0), plain, (TRUTH, TRUTH)).passed is False


def test_a_wrong_shape_fails() -> None:
    assert judge(UNJUDGED, (torch.zeros(2),), off_by(0, 0, 0), (TRUTH,)).passed is False


def test_out_of_memory_is_not_judged() -> None:
    def check() -> CheckResult:
        raise torch.OutOfMemoryError("CUDA out of memory")

    result = note_out_of_memory(UNJUDGED, check)
    assert result.passed is None and "memory" in result.note


def test_exact_arithmetic_runs_specifications_without_tf32() -> None:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    try:
        with exact_arithmetic():
            assert dispatch.backend(torch.zeros(1)) == "reference"
            assert not torch.backends.cudnn.allow_tf32
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cudnn.allow_tf32 = before


def test_the_truth_has_a_wider_precision() -> None:
    assert wider(torch.float16) == wider(torch.bfloat16) == torch.float32
    assert wider(torch.float32) == torch.float64
