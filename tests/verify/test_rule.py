"""The rule's verdicts, on numbers whose distances are known."""

from __future__ import annotations

import math

import pytest
import torch

from fastsd.kernels import dispatch
from fastsd.verify.rule import Row, attempted, exactly, judged, wider

ROW = Row("op", "op")
TRUTH = torch.tensor([1.0, -4.0, 2.0], dtype=torch.float64)
ULP = 4 * 2.0**-23  # of the largest number, in fp32


def at(*distances: float) -> tuple[torch.Tensor]:
    return ((TRUTH + torch.tensor(distances, dtype=torch.float64)).float(),)


@pytest.mark.parametrize(
    ("error", "torch_error", "slack", "passed"),
    [
        (0.0, 0.0, 0.0, True),
        (ULP, 0.0, 0.0, True),  # an ulp of the largest
        (4 * ULP, 0.0, 0.0, False),
        (4 * ULP, 2 * ULP, 0.0, True),  # twice PyTorch's distance
        (8 * ULP, 2 * ULP, 0.0, False),
        (8 * ULP, 2 * ULP, 4 * ULP, True),
    ],
)
def test_twice_pytorchs_error_and_an_ulp(error: float, torch_error: float, slack: float, passed: bool) -> None:
    row = judged(ROW, at(0, 0, error), at(0, -torch_error, 0), (TRUTH,), slack)
    assert row.passed is passed
    assert row.error == pytest.approx(error) and row.torch_error == pytest.approx(torch_error)


def test_not_a_number_never_passes() -> None:
    assert judged(ROW, at(0, math.nan, 0), at(0, 0, 0), (TRUTH,)).passed is False


def test_where_pytorch_overflows() -> None:
    assert judged(ROW, at(0, 0, 1), at(0, math.inf, 0), (TRUTH,)).passed is True
    assert judged(ROW, at(0, 0, math.inf), at(0, math.inf, 0), (TRUTH,)).passed is None


def test_numbers_that_the_dtype_cannot_hold_do_not_count() -> None:
    truth = torch.tensor([1.0, 1e6], dtype=torch.float64)
    fast, plain = truth.half(), truth.half()
    row = judged(ROW, (fast,), (plain,), (truth,))
    assert row.passed and row.error == 0


def test_the_worst_of_several_results_is_told() -> None:
    plain = at(0, ULP, 0) * 2
    row = judged(ROW, at(0, 0, 0) + at(0, 2 * ULP, 0), plain, (TRUTH, TRUTH))
    assert row.passed and row.error == pytest.approx(2 * ULP)
    assert judged(ROW, at(9, 0, 0) + at(0, 0, 0), plain, (TRUTH, TRUTH)).passed is False


def test_a_wrong_shape_fails() -> None:
    assert judged(ROW, (torch.zeros(2),), at(0, 0, 0), (TRUTH,)).passed is False


def test_too_little_memory_is_no_verdict() -> None:
    def work() -> Row:
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert attempted(ROW, work).passed is None


def test_exactly_runs_specifications_without_tf32() -> None:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    try:
        with exactly():
            assert dispatch.backend(torch.zeros(1)) == "reference"
            assert not torch.backends.cudnn.allow_tf32
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cudnn.allow_tf32 = before


def test_the_truth_is_wider() -> None:
    assert wider(torch.float16) == wider(torch.bfloat16) == torch.float32
    assert wider(torch.float32) == torch.float64
