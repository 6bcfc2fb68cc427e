"""Matrix products with their epilogue against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastsd.kernels import dispatch
from fastsd.kernels.linear import activate, activate_by_image, linear, product_by_image
from tests.support.precision import DTYPES, check, check_batch, rand

SHAPES = [  # rows, in, out
    ((2, 20), 320, 960),  # a fused query-key-value projection
    ((1, 77), 768, 64),  # the text's keys and values: no multiple of a block of rows
    ((1,), 320, 640),  # one row, for which oneDNN has a separate path
    ((3, 5), 33, 17),  # primes and odd sizes
    ((7,), 1, 1),  # sums of one product
    ((2, 0), 8, 8),  # no rows
]


def plain(activation: str, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, r: torch.Tensor | None):
    y = activate(F.linear(x, w, b), activation)
    return y if r is None else y + r


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["none", "silu", "gelu", "quick_gelu"])
@pytest.mark.parametrize(("rows", "k", "n"), SHAPES[:-1])
@torch.no_grad()
def test_linear(rows, k, n, activation, dtype):
    x, w, b = rand(*rows, k, dtype=dtype), rand(n, k, dtype=dtype, scale=k**-0.5), rand(n, dtype=dtype)
    run = lambda x, w, b, r: linear(x, w, b, activation, r)  # noqa: E731
    for bias, residual in ((b, None), (None, rand(*rows, n, dtype=dtype, seed=1))):
        inputs = (x, w, bias, residual)
        check(run, lambda *t: plain(activation, *t), *inputs, roundings=k + 1)
    with dispatch.reference_only():
        check(run, lambda *t: plain(activation, *t), x, w, b, None, roundings=k + 1)


@torch.no_grad()
def test_linear_of_no_rows_and_of_strided_views():
    w, b = rand(8, 16, dtype=torch.float32), rand(8, dtype=torch.float32)
    assert linear(torch.empty(2, 0, 16), w, b).shape == (2, 0, 8)
    x = rand(6, 10, 40, dtype=torch.float32)[::2, 1:8, 5:21]
    check(linear, F.linear, x, w, b, roundings=17)


def test_linear_refuses_an_unknown_activation():
    with pytest.raises(ValueError, match="'relu7'.*quick_gelu"):
        linear(torch.ones(2, 3), torch.ones(4, 3), activation="relu7")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("s", "k", "n"), [(64, 64, 192), (1, 320, 1280), (77, 64, 64), (5, 33, 17), (16, 96, 96)])
@torch.no_grad()
def test_linear_does_not_depend_on_the_batch(s, k, n, dtype):
    w, b = rand(n, k, dtype=dtype, scale=k**-0.5), rand(n, dtype=dtype)
    check_batch(lambda x, r: linear(x, w, b, "none", r), rand(5, s, k, dtype=dtype), rand(5, s, n, dtype=dtype))
    check_batch(lambda x: linear(x, w, b, "gelu"), rand(5, s, k, dtype=dtype))


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float16))
@pytest.mark.parametrize("activation", ["none", "silu", "gelu", "quick_gelu"])
def test_activations_do_not_depend_on_the_batch(activation, dtype):
    """Enough elements for three threads, whose shares end inside an image and inside a vector."""
    x = rand(4, 256, 2 * 640, dtype=dtype)[..., 640:]
    check_batch(lambda x: activate_by_image(x, activation), x, anywhere=True)
    assert torch.equal(activate_by_image(x[:1], activation), activate(x[:1], activation))


@pytest.mark.parametrize("activation", ["none", "silu", "gelu", "quick_gelu"])
def test_linear_gradients(activation):
    shapes = ((2, 3, 5), (4, 5), (4,), (2, 3, 4))
    tensors = [rand(*shape, dtype=torch.float64).requires_grad_(True) for shape in shapes]
    assert torch.autograd.gradcheck(lambda x, w, b, r: linear(x, w, b, activation, r), tensors)


@pytest.mark.parametrize("index", range(4))
def test_any_input_of_linear_may_require_gradients_in_fp32(index):
    x, w, b, r = (rand(*shape, dtype=torch.float32) for shape in ((2, 3, 5), (4, 5), (4,), (2, 3, 4)))
    tensor = (x, w, b, r)[index].requires_grad_(True)
    linear(x, w, b, "none", r).sum().backward()
    assert tensor.grad is not None


@pytest.mark.parametrize("name", ["torch", "onednn", "triton", "reference"])
@torch.no_grad()
def test_linear_reads_a_skip_connection(name):
    x, skip, residual = rand(2, 9, 20, dtype=torch.float32), rand(2, 9, 12, dtype=torch.float32), torch.ones(2, 9, 24)
    w, b = rand(24, 32, dtype=torch.float32), rand(24, dtype=torch.float32)
    expected = torch.cat([x, skip], -1).double() @ w.double().T + b + 1
    with dispatch.forced(name):
        result = linear(x, w, b, "none", residual, skip)
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("s", "n", "threads", "calls"), [(16, 48, 2, 1), (15, 48, 1, 1), (15, 48, 2, 3), (16, 40, 2, 3)]
)
@torch.no_grad()
def test_a_small_product_of_a_batch_is_one_call_where_threads_get_whole_blocks(s, n, threads, calls):
    """Fifteen rows, or columns that do not fill lines, are computed in another order beside a second image."""
    x, w, b = rand(3, s, 16, dtype=torch.float32), rand(n, 16, dtype=torch.float32), rand(n, dtype=torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with torch.profiler.profile() as profiler:
            result = product_by_image(x, w, b)
    finally:
        torch.set_num_threads(before)
    assert sum(event.count for event in profiler.key_averages() if event.key == "aten::baddbmm") == calls
    torch.testing.assert_close(result, F.linear(x, w, b))
