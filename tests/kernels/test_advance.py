"""The sampler's update in place against its formula; tests/sampling/test_advance.py walks whole tables."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastsd.kernels.advance import WIDTH, advance, advance_ref
from tests.support.precision import rand

SHAPE = (2, 5, 3, 4)
GUIDANCE, IMAGE_GUIDANCE = 7.5, 1.5
CHANGED = ("x", "x_in", "saved", "history", "noise")


def buffers(parts: int = 2, save: float = 1.0, push: float = 1.0, out_dtype: torch.dtype = torch.float64) -> dict:
    """Every buffer random, so that a term that is missing or doubled shows."""
    table = rand(3, WIDTH, dtype=torch.float64)
    table[:, 12], table[:, 13] = save, push
    return {
        "x": rand(*SHAPE, dtype=torch.float64, seed=1),
        "x_in": rand(*SHAPE, dtype=out_dtype, seed=2),
        "out": rand(parts * SHAPE[0], *SHAPE[1:], dtype=out_dtype, seed=3),
        "table": table,
        "row": torch.tensor([1]),
        "saved": rand(*SHAPE, dtype=torch.float64, seed=4),
        "history": rand(3, *SHAPE, dtype=torch.float64, seed=5),
        "noise": rand(2, *SHAPE, dtype=torch.float64, seed=6),
        "guidance": GUIDANCE,
        "rescale": None,
        "image_guidance": IMAGE_GUIDANCE if parts == 3 else None,
    }


def formula(b: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The docstring of `advance`, line by line."""
    b = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in b.items()}
    _, _, p, q, a, s, b0, b1, b2, b3, n, m, save, push, _, _ = b["table"][1].tolist()
    out, h, (fresh, last) = b["out"].double(), b["history"], b["noise"]
    if len(out) == 2 * len(b["x"]):
        uncond, cond = out.chunk(2)
        out = uncond + GUIDANCE * (cond - uncond)
    elif len(out) == 3 * len(b["x"]):
        uncond, image, cond = out.chunk(3)
        out = uncond + GUIDANCE * (cond - image) + IMAGE_GUIDANCE * (image - uncond)
    if b["rescale"] is not None:
        out = out * b["rescale"].view(-1, 1, 1, 1)
    saved = b["x"] if save else b["saved"]
    denoised = p * b["x"] + q * out
    x = a * b["x"] + s * saved + b0 * denoised + b1 * h[0] + b2 * h[1] + b3 * h[2] + n * fresh + m * last
    history = torch.stack([denoised, h[0], h[1]]) if push else h
    noise = torch.stack([fresh, fresh])
    return {"x": x, "x_in": b["table"][2, 1] * x, "saved": saved, "history": history, "noise": noise}


CASES: dict[str, dict[str, Any]] = {
    "a full row": {},
    "without guidance": {"parts": 1},
    "guided by a text and an image": {"parts": 3},
    "a row that does not save": {"save": 0.0},
    "a row that does not push": {"push": 0.0},
    "outputs and inputs in 16 bits": {"out_dtype": torch.bfloat16},
}


@pytest.mark.parametrize("run", [advance, advance_ref])
@pytest.mark.parametrize("reason", CASES)
@pytest.mark.parametrize("rescaled", [False, True])
def test_advance(reason: str, rescaled: bool, run: Any) -> None:
    b = buffers(**CASES[reason])
    if rescaled and len(b["out"]) > SHAPE[0]:
        b["rescale"] = rand(SHAPE[0], dtype=torch.float64, seed=7)
    expected, untouched = formula(b), {name: b[name].clone() for name in ("out", "table", "row")}
    run(**b)
    for name in CHANGED:
        # Both add up a dozen products in float64, in their own order. The network's input is rounded to its dtype.
        tolerance = 1e-13 + (torch.finfo(b[name].dtype).eps if name == "x_in" else 0.0)
        largest = float(expected[name].abs().max())
        torch.testing.assert_close(b[name].double(), expected[name], rtol=0, atol=tolerance * largest)
    assert all(torch.equal(b[name], before) for name, before in untouched.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": torch.ones(3, *SHAPE[1:])}, r"out is \[3, 5, 3, 4\]; x is .* twice or three times its batch"),
        ({"out": torch.ones(6, *SHAPE[1:])}, "image_guidance belongs to an out of three times the batch"),
        ({"image_guidance": 1.5}, "image_guidance belongs to an out of three times the batch"),
        ({"x_in": torch.ones(1, *SHAPE[1:])}, "x_in and saved need the shape of x"),
        ({"saved": torch.ones(SHAPE)}, "saved its dtype"),
        ({"history": torch.ones(2, *SHAPE, dtype=torch.float64)}, r"history needs shape \[3, "),
        ({"noise": torch.ones(2, *SHAPE)}, "in the dtype of x"),
        ({"table": torch.ones(3, WIDTH - 1)}, r"table needs shape \[R \+ 1, 16\]"),
        ({"row": torch.tensor(1)}, r"row \[1\]"),
    ],
)
def test_advance_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        advance(**(buffers() | changes))
