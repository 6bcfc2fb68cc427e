"""The rule: an op is no more than twice as far from the truth as PyTorch in the same dtype, plus an ulp.

PyTorch adds up in the order that suits the processor, and the error of a sum in fp32 depends on the order, by more than
twice. So an op whose results are sums may also be as far off as their roundings can take them in any order: n of them,
of independent sign, each of at most 2^-24 of a partial sum. Where terms have either sign, as here, partial sums are no
larger than the largest result, and the error is within sqrt(n) 2^-24 of that: five or more standard deviations (Higham
and Mary 2019, theorem 2.4, with partial sums in place of sums of magnitudes). In bf16 the ulp is larger.
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
        plain: the same function in a few public PyTorch operations; in float64 it is the truth.
        inputs: tensors in the dtype that both compute in.
        roundings: in fp32 on the way to one result, in whatever order its terms are added.
    """
    result, same_dtype = op(*inputs).double(), plain(*inputs).double()
    dtype = next(x.dtype for x in inputs if x is not None)
    truth = plain(*(None if x is None else x.double() for x in inputs))
    largest = truth.abs().max().item()
    in_any_order = roundings**0.5 * 2.0**-24 * largest
    allowed = max(2 * (same_dtype - truth).abs().max().item(), in_any_order) + largest * torch.finfo(dtype).eps
    assert result.shape == truth.shape
    assert bool(result.isfinite().all())
    distance = (result - truth).abs().max().item()
    assert distance <= allowed, f"{distance:.3g} from the truth, where {allowed:.3g} is allowed"


def check_batch(op: Op, *inputs: torch.Tensor, anywhere: bool = False) -> None:
    """Assert that each image of a batch comes out bit for bit as it does alone, on one to three threads.

    Skipped where that is promised neither `anywhere` nor on this processor (docs/numerics.md): PyTorch's own products
    in fp32 depend on how many rows there are.
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
