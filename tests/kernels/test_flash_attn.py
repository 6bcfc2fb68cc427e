"""Attention against float64, especially with large or nearly equal logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastsd.kernels import dispatch
from fastsd.kernels import flash_attn as module
from fastsd.kernels.choice.call import Call, Op
from fastsd.kernels.choice.truth import truth
from fastsd.kernels.flash_attn import flash_attn
from tests.support.precision import DTYPES, check, check_batch, rand

SHAPES = [  # batch, S, T, heads, head size
    (2, 256, 256, 2, 40),  # SD1's head size: the scale is no power of two; spare columns
    (1, 1024, 77, 2, 64),  # a text's length; a scale that is a power of two
    (1, 257, 131, 1, 33),  # primes and odd sizes
    (1, 200, 4099, 1, 40),  # several chunks of rows, the last one short
    (1, 256, 256, 1, 512),  # the autoencoder
    (1, 200, 200, 1, 16),  # no spare column for the sums: 16 are added
    (2, 64, 64, 2, 160),  # small enough for PyTorch's attention
    (1, 1, 7, 2, 8),  # one query
    (1, 20000, 1, 1, 8),  # one key: the weights are all 1
]


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = False) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)


def inputs(batch: int, s: int, t: int, heads: int, size: int, dtype: torch.dtype, scale: float = 1.0):
    q, k, v = ((batch, n, heads, size) for n in (s, t, t))
    return rand(*q, dtype=dtype, scale=scale), rand(*k, dtype=dtype, scale=scale, seed=1), rand(*v, dtype=dtype, seed=2)


def roundings(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> float:
    """The roundings of one result: T in its sum, T in the sum of its weights, and the effect of D in each logit.

    An error e of a logit moves the result by p (v - result) e. A sum of D products has an error of standard deviation
    2^-24 sqrt(D / 6) |q * k|, with * elementwise: the mean square of its partial sums is half that of the sum, and that
    of a rounding a third of its bound's square. Six standard deviations over all logits count as roundings.
    """
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        logits = logits.masked_fill(torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    weights = logits.softmax(-1)
    result, errors = weights @ v, weights.square() * (q.square() @ k.square().transpose(-1, -2) / q.shape[-1])
    moved = errors @ v.square() - 2 * result * (errors @ v) + result.square() * errors.sum(-1, keepdim=True)
    return 2 * k.shape[-2] + 6 * q.shape[-1] * (moved.max() / result.square().max()).item()


def check_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = False) -> None:
    check(
        lambda *t: flash_attn(*t, causal),
        lambda *t: plain(*t, causal),
        *(q, k, v),
        roundings=roundings(q, k, v, causal),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_flash_attn(shape, dtype):
    tensors = inputs(*shape, dtype=dtype)
    check_attention(*tensors)
    with dispatch.reference_only():
        check_attention(*tensors)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-4, 0.3, 2.0, 4.0, 20.0])
@torch.no_grad()
def test_flash_attn_at_logits_of_all_sizes(scale, dtype):
    """Standard deviations of the logits from 1e-8 to 400. Beyond about 10, the bound exceeds some maximum too far."""
    check_attention(*inputs(1, 256, 300, 2, 40, dtype=dtype, scale=scale))


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_flash_attn_of_keys_with_a_large_common_part(dtype):
    """It only shifts all logits of a row, by about +-300."""
    q, k, v = inputs(1, 256, 256, 1, 40, dtype=dtype)
    check_attention(q, k + rand(1, 1, 1, 40, dtype=dtype, scale=40), v)


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_flash_attn_between_two_nearly_equal_large_logits(dtype):
    """Two logits far above all others, 0.03 apart: rounded to bf16, they would differ by 0 or 0.12."""
    q, k, v = (x.clone() for x in inputs(1, 256, 256, 1, 64, dtype=dtype, scale=0.1))
    q[..., 0], k[..., 0] = 16.0, 0.0
    k[:, :2, :, 0] = 8.0  # logits of 16 * 8 / 8 = 16
    q[..., 1], k[:, 0, :, 1], k[:, 1, :, 1] = 0.25, 1.0, 0.0
    check_attention(q, k, v)


@torch.no_grad()
def test_flash_attn_reads_views_of_a_fused_projection():
    for dtype in DTYPES:
        q, k, v = rand(2, 256, 3, 4, 16, dtype=dtype).unbind(2)
        assert torch.equal(flash_attn(q, k, v), flash_attn(q.contiguous(), k.contiguous(), v.contiguous()))


@torch.no_grad()
def test_a_head_with_large_logits_does_not_change_the_others():
    q, k, v = inputs(1, 256, 256, 3, 16, dtype=torch.bfloat16)
    k[:, :, 1] *= 300
    result = flash_attn(q, k, v).unflatten(-1, (3, 16))
    for h in range(3):
        alone = flash_attn(q[:, :, h : h + 1], k[:, :, h : h + 1], v[:, :, h : h + 1])
        assert torch.equal(result[:, :, h], alone)
    check_attention(q, k, v)


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_flash_attn_propagates_nan(dtype):
    q, k, v = inputs(2, 256, 256, 1, 16, dtype=dtype)
    k[0, 3] = torch.nan
    result = flash_attn(q, k, v)
    assert result[0].isnan().all() and result[1].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_flash_attn_causal(dtype):
    check_attention(*inputs(2, 77, 77, 2, 64, dtype), causal=True)
    check_attention(*inputs(1, 200, 200, 1, 8, dtype), causal=True)
    with dispatch.reference_only():
        check_attention(*inputs(1, 7, 7, 1, 8, dtype), causal=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("s", "t", "heads", "size"), [(256, 256, 2, 40), (256, 77, 2, 64), (64, 8, 4, 16), (7, 5, 1, 8)]
)
@torch.no_grad()
def test_flash_attn_does_not_depend_on_the_batch(s, t, heads, size, dtype):
    check_batch(flash_attn, *inputs(3, s, t, heads, size, dtype))


def test_flash_attn_gradients():
    tensors = [x.requires_grad_(True) for x in inputs(1, 5, 4, 2, 3, torch.float64)]
    assert torch.autograd.gradcheck(flash_attn, tensors, fast_mode=True)


@pytest.mark.parametrize("causal", [False, True])
def test_the_specification_of_both_passes_is_autograds(causal: bool) -> None:
    q, k, v = (x.requires_grad_() for x in inputs(2, 9, 7, 2, 5, torch.float64))
    out = module.flash_attn_ref(q, k, v, causal)
    wanted = out, *torch.autograd.grad(out, (q, k, v), q.detach().flatten(2))
    for found, other in zip(module.flash_attn_gradients_ref(q, k, v, causal), wanted, strict=True):
        assert found.shape == other.shape and (found - other).abs().max() < 1e-14 * max(1.0, other.abs().max())


def test_pytorchs_gradients_are_those_of_the_specification_also_of_inference_tensors() -> None:
    with torch.inference_mode():  # in which ways are compared
        given = inputs(2, 9, 7, 2, 8, torch.float32)
    # Sums of 9 terms, each a sum of 8.
    for found, wanted in zip(module._gradients_by_pytorch(*given, False), module.flash_attn_gradients_ref(*given)):
        assert found.shape == wanted.shape and (found - wanted).abs().max() < 9 * 2**-24 * 8 * wanted.abs().max()


def test_the_true_gradients_are_the_same_head_by_head() -> None:
    q, k, v = inputs(2, 9, 7, 3, 8, torch.float32)
    call = Call.bind(Op("flash_attn_gradients", module.flash_attn_gradients_ref), q, k, v)
    whole = module.flash_attn_gradients_ref(q.double(), k.double(), v.double())
    for found, wanted in zip(truth(call), whole, strict=True):
        assert found.shape == wanted.shape and (found - wanted).abs().max() < 1e-14 * wanted.abs().max()


def test_flash_attn_refuses_shapes_that_do_not_match():
    q, k = torch.ones(1, 4, 2, 8), torch.ones(1, 4, 2, 16)
    with pytest.raises(ValueError, match=r"q \(1, 4, 2, 8\)"):
        flash_attn(q, k, k)


def test_chunks_cover_every_row_once():
    for rows, columns in [(1, 1), (5, module.CHUNK), (5, 2 * module.CHUNK), (4100, 4096)]:
        assert [i for chunk in module._chunks(rows, columns) for i in range(rows)[chunk]] == list(range(rows))
