"""The rule: an op's error is at most twice that of PyTorch in the same dtype, plus an ulp.

PyTorch adds in an order that suits the processor, and the error of an fp32 sum varies with the order by more than a
factor of two. So an op whose results are sums may also have the error of n roundings in any order. Each is at most
2^-24 of a partial sum, and their signs are independent. If terms have either sign, as here, partial sums do not exceed
the largest result, and the error is within sqrt(n) 2^-24 of that: five or more standard deviations (Higham and Mary
2019, theorem 2.4, with partial sums instead of sums of magnitudes). In bf16 the ulp is larger.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastsd.kernels import dispatch

Op = Callable[..., torch.Tensor]
DTYPES = (torch.float32, torch.bfloat16)


def check(op: Op, plain: Op, *inputs: torch.Tensor | None, roundings: float = 0) -> None:
    """Assert max|op - truth| <= max(2 max|plain - truth|, sqrt(roundings) 2^-24 max|truth|) + 1 ulp of max|truth|.

    Args:
        op: the op under test.
        plain: the same function in a few public PyTorch operations; in float64, the truth.
        inputs: tensors in the dtype that both compute in.
        roundings: the number of fp32 roundings of one result, in any order of its terms.
    """
    result, same_dtype = op(*inputs).double(), plain(*inputs).double()
    dtype = next(x.dtype for x in inputs if x is not None)
    truth = plain(*(None if x is None else x.double() for x in inputs))
    largest = truth.abs().max().item()
    any_order = roundings**0.5 * 2.0**-24 * largest
    allowed = max(2 * (same_dtype - truth).abs().max().item(), any_order) + largest * torch.finfo(dtype).eps
    assert result.shape == truth.shape
    assert bool(result.isfinite().all())
    distance = (result - truth).abs().max().item()
    assert distance <= allowed, f"{distance:.3g} from the truth, where {allowed:.3g} is allowed"


def check_batch(op: Op, *inputs: torch.Tensor, anywhere: bool = False) -> None:
    """Assert that each image of a batch equals, bit for bit, the image computed alone, on one to three threads.

    anywhere: it holds on every processor; otherwise only where oneDNN computes (docs/numerics.md), because the rows of
    PyTorch's own fp32 products depend on the number of rows. The test is skipped elsewhere.
    """
    if not (anywhere or torch.float32 in dispatch.onednn_dtypes()):
        pytest.skip("PyTorch has no oneDNN for this processor")
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for batch in (2, len(inputs[0])):
                whole = op(*(x[:batch] for x in inputs))
                for i in range(batch):
                    alone = op(*(x[i : i + 1] for x in inputs))
                    assert torch.equal(whole[i : i + 1], alone), f"image {i} of {batch}, {count} threads"
    finally:
        torch.set_num_threads(threads)


def rand(*shape: int, dtype: torch.dtype, scale: float = 1.0, mean: float = 0.0, seed: int = 0) -> torch.Tensor:
    """Normal numbers, the same in every run."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(*shape, generator=generator) * scale + mean).to(dtype)
