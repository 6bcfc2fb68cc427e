"""Group normalisation with SiLU against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastsd.kernels import dispatch
from fastsd.kernels.groupnorm_silu import groupnorm_silu
from tests.support.precision import DTYPES, check, check_batch, rand

SHAPES = [  # batch, height, width, channels, groups, mean, standard deviation
    (2, 8, 8, 64, 32, 0.0, 1.0),  # two channels per group
    (1, 5, 7, 33, 3, 0.0, 1.0),  # odd everything
    (2, 48, 48, 32, 8, 0.0, 1.0),  # enough pixels for several threads
    (1, 1, 1, 64, 32, 0.0, 1.0),  # groups of two values
    (1, 16, 16, 32, 32, 30.0, 1e-3),  # E[x^2] - E[x]^2 would cancel
    (1, 12, 12, 320, 32, 30.0, 1.0),  # the same, with many channels
    (1, 16, 16, 32, 8, 0.0, 1e-6),  # eps decides
    (1, 110, 90, 16, 2, 1.0, 1.0),  # long sums, in several blocks of pixels, the last one short
    (1, 16, 16, 32, 8, 0.0, 1e4),  # large activations of the autoencoder
]


def plain(groups: int, silu: bool, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, add: torch.Tensor | None):
    """In contiguous memory, where PyTorch's norm does not cancel as it does in channels-last memory."""
    x = (x if add is None else x + add[:, None, None, :]).permute(0, 3, 1, 2).contiguous()
    y = F.group_norm(x, groups, w, b, 1e-5).permute(0, 2, 3, 1)
    return F.silu(y) if silu else y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize(("batch", "height", "width", "channels", "groups", "mean", "std"), SHAPES)
@torch.no_grad()
def test_groupnorm_silu(batch, height, width, channels, groups, mean, std, silu, dtype):
    x = rand(batch, height, width, channels, dtype=dtype, scale=std, mean=mean)
    w, b = rand(channels, dtype=dtype), rand(channels, dtype=dtype, seed=1)
    for add in (None, rand(batch, channels, dtype=dtype, scale=std), rand(1, channels, dtype=dtype, scale=std)):
        for name in ("onednn", "reference"):
            with dispatch.forced(name):
                check(
                    lambda x, w, b, add: groupnorm_silu(x, w, b, groups, 1e-5, silu, add),
                    lambda *t: plain(groups, silu, *t),
                    *(x, w, b, add),
                )


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float16))
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize(
    ("size", "channels", "groups"), [(48, 64, 32), (20, 64, 8), (25, 33, 3), (8, 64, 8), (3, 33, 3), (1, 32, 32)]
)
@torch.no_grad()
def test_groupnorm_silu_does_not_depend_on_the_batch(size, channels, groups, silu, dtype):
    w, b = rand(channels, dtype=dtype), rand(channels, dtype=dtype)
    x, add = rand(3, size, size, channels, dtype=dtype), rand(3, channels, dtype=dtype)
    check_batch(lambda x, add: groupnorm_silu(x, w, b, groups, 1e-5, silu, add), x, add, anywhere=True)


@torch.no_grad()
def test_groupnorm_silu_in_fp16():
    """oneDNN computes in fp16 on no processor; the CPU path takes it nevertheless."""
    x, w, b = rand(1, 110, 90, 16, dtype=torch.float16, mean=1.0), torch.ones(16).half(), torch.zeros(16).half()
    assert dispatch.backend(x) == "torch" and dispatch.backend(x, op="groupnorm_silu") == "onednn"
    check(lambda x, w, b: groupnorm_silu(x, w, b, 2, 1e-5), lambda x, w, b: plain(2, True, x, w, b, None), x, w, b)


@pytest.mark.parametrize("name", ["onednn", "torch", "reference"])
@torch.no_grad()
def test_groupnorm_silu_of_one_value_per_group_is_its_bias(name):
    x, b = rand(2, 1, 1, 8, dtype=torch.float32), rand(8, dtype=torch.float32)
    with dispatch.forced(name):
        result = groupnorm_silu(x, torch.ones(8), b, 8, 1e-5, silu=False)
    # x - mean may be an ulp of x instead of 0, and is multiplied by 1 / sqrt(eps).
    assert (result - b.expand_as(result)).abs().max() <= x.abs().max() * 2.0**-23 * 1e-5**-0.5


@torch.no_grad()
def test_groupnorm_silu_does_not_change_its_input():
    x = rand(1, 4, 4, 8, dtype=torch.float32)
    before = x.clone()
    groupnorm_silu(x, torch.ones(8), torch.zeros(8), 2, 1e-5, True, rand(1, 8, dtype=torch.float32))
    assert torch.equal(x, before)


def test_groupnorm_silu_refuses_groups_that_do_not_divide():
    with pytest.raises(ValueError, match="3 groups do not divide 8"):
        groupnorm_silu(torch.ones(1, 2, 2, 8), torch.ones(8), torch.ones(8), 3, 1e-5)


def test_groupnorm_silu_gradients():
    tensors = [rand(*s, dtype=torch.float64).requires_grad_(True) for s in ((2, 3, 2, 4), (4,), (4,), (2, 4))]
    assert torch.autograd.gradcheck(lambda x, w, b, add: groupnorm_silu(x, w, b, 2, 1e-5, True, add), tensors)


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_groupnorm_silu_reads_a_skip_connection(dtype):
    """One group has channels of both parts."""
    x, skip = rand(2, 7, 5, 20, dtype=dtype), rand(2, 7, 5, 12, dtype=dtype, seed=1)
    w, b, add = rand(32, dtype=dtype), rand(32, dtype=dtype, seed=1), rand(2, 32, dtype=dtype, seed=2)
    for name in ("onednn", "torch", "reference"):
        with dispatch.forced(name):
            result = groupnorm_silu(x, w, b, 4, 1e-5, True, add, skip)
            assert torch.equal(result, groupnorm_silu(torch.cat([x, skip], -1), w, b, 4, 1e-5, True, add))
