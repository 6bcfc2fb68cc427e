"""The kernel of `advance` against float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsd.kernels.advance import advance_ref
from fastsd.kernels.triton import advance as module
from tests.support.triton_checks import DEVICE, DTYPES, SENTINEL, Guards, broken, compare, must_fail, rand

CHANGED = ("x", "x_in", "saved", "history", "noise")


def buffers(shape: tuple[int, ...], dtype: torch.dtype, parts: int, rescaled: bool, row: int, saves: int, pushes: int):
    """The buffers of one update; no two coefficients of the table are equal."""
    wide = {"dtype": torch.float32}
    table = rand(4, 16, **wide)
    table[:, 12], table[:, 13] = saves, pushes
    return {
        "x": rand(*shape, **wide),
        "x_in": rand(*shape, dtype=dtype, seed=1),
        "out": rand(parts * shape[0], *shape[1:], dtype=dtype, seed=2),
        "table": table,
        "row": torch.tensor([row]),
        "saved": rand(*shape, **wide, seed=3),
        "history": rand(3, *shape, **wide, seed=4),
        "noise": rand(2, *shape, **wide, seed=5),
        "guidance": torch.tensor([7.5]),
        "rescale": rand(shape[0], **wide, seed=6) if rescaled and parts > 1 else None,
        "image_guidance": torch.tensor([1.5]) if parts == 3 else None,
    }


def plain(*tensors):
    """The specification's results; x_in in the dtype of `out`, or in float64 like everything else."""
    inputs = [None if t is None else t.clone() for t in tensors]
    advance_ref(*inputs)
    return inputs[0], inputs[1], inputs[5], inputs[6], inputs[7]


def run(shape, dtype, parts=2, rescaled=True, row=1, saves=1, pushes=1, number=False, kernels: Any = module):
    tensors = buffers(shape, dtype, parts, rescaled, row, saves, pushes)
    guards = Guards()
    placed = {name: None if t is None else guards.place(t, guard=SENTINEL) for name, t in tensors.items()}
    with guards:
        numbers = {"guidance": 7.5, "image_guidance": 1.5 if parts == 3 else None} if number else {}
        kernels.advance(**placed | numbers)
    guards.intact()
    for name, before in tensors.items():
        if before is not None and name not in CHANGED:
            assert torch.equal(placed[name].cpu(), before), f"{name} was changed"
    compare([placed[name] for name in CHANGED], plain, *tensors.values())


CASES = {
    "one latent": ((1, 8, 8, 4), {}),
    "all sizes odd": ((3, 5, 7, 3), {}),
    "one element": ((1, 1, 1, 1), {}),
    "no guidance": ((2, 5, 5, 4), {"parts": 1}),
    "guided by a text and an image": ((3, 5, 7, 3), {"parts": 3}),
    "guided by both, as numbers": ((2, 5, 5, 4), {"parts": 3, "number": True, "rescaled": False}),
    "no rescaling": ((2, 5, 5, 4), {"rescaled": False}),
    "guidance as a number": ((2, 5, 5, 4), {"number": True}),
    "neither saves nor pushes": ((2, 3, 3, 4), {"saves": 0, "pushes": 0}),
    "saves without pushing": ((2, 3, 3, 4), {"pushes": 0}),
    "pushes without saving": ((2, 3, 3, 4), {"saves": 0}),
    "the first row": ((1, 3, 3, 4), {"row": 0}),
    "the last row": ((1, 3, 3, 4), {"row": 2}),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reason", CASES)
def test_advance(reason, dtype):
    shape, how = CASES[reason]
    run(shape, dtype, **how)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.integers(1, 4)),
    st.sampled_from(DTYPES),
    st.integers(1, 3),
    st.booleans(),
    st.integers(0, 2),
    *(st.integers(0, 1) for _ in range(2)),
)
def test_advance_at_any_shape(shape, dtype, parts, rescaled, row, saves, pushes):
    run(shape, dtype, parts, rescaled, row, saves, pushes)


MUTATIONS = {
    "writes past the end": ("mask = i < NL", "mask = i < NL + 1"),
    "misses a block": ("tl.program_id(0).to(tl.int64) * BLOCK", "0 * tl.program_id(0).to(tl.int64)"),
    "stays in the first row": ("row * 16", "0 * row"),
    "scales the next input by this row": ("coefficients + 17", "coefficients + 1"),
    "swaps the halves": ("guided + scale * (second - guided)", "guided + scale * (guided - second)"),
    "uses one half": ("out_ptr + NL + i", "out_ptr + i"),
    "reads the text's part twice": ("out_ptr + 2 * NL + i", "out_ptr + NL + i"),
    "guides the text from no image": ("scale * (cond - second)", "scale * (cond - guided)"),
    "swaps the scales": ("tl.load(image_guidance)", "tl.load(guidance)"),
    "rescales by another image": ("rescale_ptr + i // L", "rescale_ptr + i * 0"),
    "saves after the update": ("tl.where(saves, x, saved)", "saved"),
    "always saves": ("tl.where(saves, x, saved)", "x"),
    "always pushes": ("i, h0, mask=mask & pushes", "i, h0, mask=mask"),
    "shifts history by one too few": ("2 * NL + i, h1", "2 * NL + i, h2"),
    "pushes the latent instead of the prediction": ("history_ptr + i, denoised", "history_ptr + i, x"),
    "keeps the last noise": ("noise_ptr + NL + i, noise,", "noise_ptr + NL + i, last,"),
    "swaps the noises": ("n * noise + m * last", "m * noise + n * last"),
    "uses a coefficient twice": ("b3 * h2", "b2 * h2"),
}


@pytest.mark.parametrize("fault", MUTATIONS)
def test_the_checks_notice_when_advance(fault: str, tmp_path: Path):
    copy = broken(module, *MUTATIONS[fault], tmp_path)
    with must_fail():
        run((3, 5, 7, 3), torch.float32, kernels=copy)
        run((3, 5, 7, 3), torch.float32, parts=3, kernels=copy)
        run((2, 3, 3, 4), torch.float32, saves=0, pushes=0, kernels=copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": torch.ones(4, 2, 2, 4)}, "twice or three times its batch"),
        ({"out": torch.ones(3, 2, 2, 4)}, "image_guidance belongs to an out of three times the batch"),
        ({"image_guidance": torch.ones(1)}, "image_guidance belongs to an out of three times the batch"),
        ({"out": torch.ones(3, 2, 2, 4), "image_guidance": 1.5}, "both numbers or both tensors"),
        ({"out": torch.ones(3, 2, 2, 4), "image_guidance": torch.ones(2)}, "image_guidance has 2 elements"),
        ({"x_in": torch.ones(1, 2, 3, 4)}, "x_in and saved"),
        ({"history": torch.ones(2, 1, 2, 2, 4)}, "history needs"),
        ({"row": torch.tensor([1], dtype=torch.int32)}, "row .1. int64"),
        ({"rescale": torch.ones(2)}, r"needs \[1\]"),
        ({"guidance": torch.ones(2)}, "guidance has 2 elements"),
        ({"guidance": torch.ones(1, dtype=torch.float16)}, "float32"),
        ({"x": torch.ones(1, 2, 2, 4, dtype=torch.float64)}, "float32"),
        ({"x": torch.ones(1, 4, 2, 2).permute(0, 2, 3, 1)}, "contiguous"),
        ({"out": torch.ones(1, 2, 2, 4, requires_grad=True)}, "no gradients"),
    ],
)
def test_advance_refuses(changes: dict[str, Any], message: str):
    good = buffers((1, 2, 2, 4), torch.float32, 2, False, 0, 1, 1)
    with pytest.raises(ValueError, match=message):
        module.advance(**(good | changes))


def test_advance_rows_follow_each_other_on_the_device():
    """The same launch, with the row index incremented on the device, applies one row after the other."""
    tensors = {
        k: t.to(DEVICE) for k, t in buffers((1, 3, 3, 4), torch.float32, 2, False, 0, 0, 1).items() if t is not None
    }
    expected = {name: t.clone() for name, t in tensors.items()}
    for _ in range(3):
        module.advance(**tensors)
        tensors["row"] += 1
        advance_ref(**expected, rescale=None)
        expected["row"] += 1
    torch.testing.assert_close(tensors["x"], expected["x"], rtol=1e-4, atol=1e-4)
