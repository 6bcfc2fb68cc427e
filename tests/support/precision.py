"""The rule: an op is no more than twice as far from the truth as PyTorch in the same dtype, plus an ulp."""

from __future__ import annotations

from collections.abc import Callable

import torch

Op = Callable[..., torch.Tensor]
DTYPES = (torch.float32, torch.bfloat16)


def check(op: Op, plain: Op, *inputs: torch.Tensor | None) -> None:
    """Assert max|op - plain in float64| <= 2 max|plain - plain in float64| + 1 ulp of the largest value.

    Args:
        op: the op under test.
        plain: the same function in a few public PyTorch operations.
        inputs: tensors in the dtype that both compute in.
    """
    result, same_dtype = op(*inputs).double(), plain(*inputs).double()
    dtype = next(x.dtype for x in inputs if x is not None)
    truth = plain(*(None if x is None else x.double() for x in inputs))
    ulp = truth.abs().max().item() * torch.finfo(dtype).eps
    allowed = 2 * (same_dtype - truth).abs().max().item() + ulp
    assert result.shape == truth.shape
    assert bool(result.isfinite().all())
    distance = (result - truth).abs().max().item()
    assert distance <= allowed, f"{distance:.3g} from the truth, where {allowed:.3g} is allowed"


def check_batch(op: Op, *inputs: torch.Tensor) -> None:
    """Assert that each image of a batch comes out bit for bit as it does alone, on one thread and on two."""
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
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
