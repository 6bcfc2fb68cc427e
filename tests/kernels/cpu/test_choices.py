"""The table of the CPU's ways: complete, followed by every op, and each way correct where the table takes it or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastsd.kernels import conv2d, dispatch, flash_attn, geglu, groupnorm_silu, linear, upsample2x
from fastsd.kernels.cpu import choices, onednn
from tests.support.precision import rand

# For each op: a call with whole cache lines, and its specification.
CALLS: dict[str, tuple[Callable[..., Any], Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "flash_attn": (flash_attn.flash_attn, flash_attn.flash_attn_ref, ((2, 24, 2, 32), (2, 20, 2, 32), (2, 20, 2, 32))),
    "flash_attn, wide heads": (flash_attn.flash_attn, flash_attn.flash_attn_ref, ((2, 24, 1, 256),) * 3),
    "linear": (linear.linear, linear.linear_ref, ((2, 24, 32), (48, 32), (48,))),
    "geglu": (geglu.geglu, geglu.geglu_ref, ((2, 24, 32), (96, 32), (96,))),
    "groupnorm_silu": (
        lambda x, w, b: groupnorm_silu.groupnorm_silu(x, w, b, 4, 1e-5),
        lambda x, w, b: groupnorm_silu.groupnorm_silu_ref(x, w, b, 4, 1e-5),
        ((2, 6, 7, 24), (24,), (24,)),
    ),
    "conv2d": (
        lambda x, w, b: conv2d.conv2d(x, w, b, 1, (1, 1, 1, 1)),
        lambda x, w, b: conv2d.conv2d_ref(x, w, b, 1, (1, 1, 1, 1)),
        ((2, 6, 7, 16), (16, 16, 3, 3), (16,)),
    ),
    "upsample2x_conv": (upsample2x.upsample2x_conv, upsample2x.upsample2x_conv_ref, ((2, 6, 7, 8), (5, 8, 3, 3), (5,))),
    "upsample2x_conv, kept weights": (
        lambda x, w, b: upsample2x.upsample2x_conv(x, onednn.pack(w, torch.Size((2, 12, 14, 8)), 1, (1, 1, 1, 1)), b),
        upsample2x.upsample2x_conv_ref,
        ((2, 6, 7, 8), (5, 8, 3, 3), (5,)),
    ),
    "upsample2x_conv, Winograd's": (
        upsample2x.upsample2x_conv,
        upsample2x.upsample2x_conv_ref,
        ((1, 9, 8, 176), (176, 176, 3, 3), (176,)),
    ),
}


def inputs(op: str, dtype: torch.dtype) -> list[torch.Tensor]:
    return [rand(*shape, dtype=dtype, seed=i) for i, shape in enumerate(CALLS[op][2])]


def test_the_table_has_a_row_for_every_op_processor_and_dtype() -> None:
    expected = {(op, p, d) for op, facts in choices.OPS.items() for p, dtypes in facts.dtypes.items() for d in dtypes}
    assert choices.TABLE.keys() == expected
    for (op, _, _), steps in choices.TABLE.items():
        sizes = [size for size, _ in steps]
        assert sizes == sorted(sizes, reverse=True) and sizes[-1] == 0
        assert {name for _, name in steps} <= set(choices.OPS[op].ways)


@pytest.mark.parametrize("op", choices.OPS)
@torch.no_grad()
def test_every_op_asks_the_table_and_goes_no_other_way(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    way = choices.way

    def record(name: str, dtype: torch.dtype, size: int) -> str:
        asked.append(way(name, dtype, size))
        assert name == op
        return asked[-1]

    monkeypatch.setattr(choices, "way", record)
    with dispatch.forced("onednn"):
        CALLS[op][0](*inputs(op, torch.float32))
    assert len(asked) == 1 and asked[0] in choices.OPS[op].ways


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("op", "name"), [(op, name) for op, facts in choices.OPS.items() for name in facts.ways])
@torch.no_grad()
def test_every_way_computes_the_op(op: str, name: str, dtype: torch.dtype) -> None:
    if op != "groupnorm_silu" and dtype not in dispatch.onednn_dtypes():
        pytest.skip(f"PyTorch's oneDNN does not compute in {dtype} here")
    run, reference, _ = CALLS[op]
    tensors = inputs(op, dtype)
    truth = reference(*(t.double() for t in tensors))
    with choices.forced(op, name), dispatch.forced("onednn"):
        result = run(*tensors)
    # No op here has more than 96 terms but a convolution, or rounds more than four times in its dtype.
    terms = max(96, tensors[1][0].numel()) if "conv" in op else 96
    assert (result - truth).abs().max() <= 4 * torch.finfo(dtype).eps * truth.abs().max() * (terms**0.5 / 4)
    assert result.dtype == dtype and result.is_contiguous()


@pytest.mark.parametrize("size", [1, 2**10, 2**20])
def test_a_choice_depends_on_the_processor_and_the_size_alone(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "processor", lambda: "avx2")
    assert choices.way("flash_attn", torch.float32, size) == "sdpa"
    monkeypatch.setattr(choices, "processor", lambda: "avx512")
    assert choices.way("flash_attn", torch.float32, size) == ("products" if size >= 2**14 else "sdpa")


def test_forced_ways_end_with_their_context() -> None:
    table = choices.way("linear", torch.float32, 2**30)
    with choices.forced("linear", "torch"):
        assert choices.way("linear", torch.float32, 2**30) == "torch"
    assert choices.way("linear", torch.float32, 2**30) == table


def test_no_size_is_chosen_outside_of_the_table() -> None:
    """A threshold in an op's file would be a second table."""
    for module in (conv2d, flash_attn, geglu, groupnorm_silu, linear, upsample2x):
        assert not [name for name in vars(module) if name in ("SMALLEST", "LARGEST", "THRESHOLD")], module.__name__
