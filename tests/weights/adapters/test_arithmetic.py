"""The changes of adapters by hand-worked examples; tests/agreement/test_adapters.py compares with peft and LyCORIS."""

from __future__ import annotations

import pytest
import torch

from fastsd.weights.adapters.arithmetic import adapted

BASE = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
UP, DOWN = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 5.0]])  # up @ down = [[3, 5], [6, 10]]
CASES = {
    "LoRA": ({"up": UP, "down": DOWN}, None, [[4.0, 7.0], [9.0, 14.0]]),
    "alpha over rank": ({"up": UP, "down": DOWN, "alpha": torch.tensor(2.0)}, None, [[7.0, 12.0], [15.0, 24.0]]),
    "a scale from PEFT's config": ({"up": UP, "down": DOWN}, 2.0, [[7.0, 12.0], [15.0, 24.0]]),
    "a difference": ({"difference": torch.ones(2, 2)}, None, [[2.0, 3.0], [4.0, 5.0]]),
    # (up @ down) * (up @ down), elementwise
    "LoHa": ({"w1_a": UP, "w1_b": DOWN, "w2_a": UP, "w2_b": DOWN}, None, [[10.0, 27.0], [39.0, 104.0]]),
    "LoKr": ({"kron_w1": torch.tensor([[2.0, 1.0]]), "kron_w2": UP}, None, [[3.0, 3.0], [7.0, 6.0]]),
    # The sum [[3, 4], [4, 3]] has rows of length 5.
    "DoRA": (
        {"difference": torch.tensor([[2.0, 2.0], [1.0, -1.0]]), "magnitude_of_outputs": torch.tensor([5.0, 10.0])},
        None,
        [[3.0, 4.0], [8.0, 6.0]],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_changes(case: str) -> None:
    parts, scale, expected = CASES[case]
    assert adapted(BASE, parts, scale).tolist() == expected


LONG = 2**20  # a column by a row of this length are 4 TB
COLUMN, ROW = torch.ones(LONG, 1), torch.ones(1, LONG)


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"up": COLUMN, "down": ROW}, "makes a change of 1048576 x 1048576"),
        ({"w1_a": UP, "w1_b": DOWN, "w2_a": COLUMN, "w2_b": ROW}, "multiplies 2 x 2 by 1048576 x 1048576"),
        ({"glora_a1": UP, "glora_a2": DOWN, "glora_b1": COLUMN, "glora_b2": ROW}, "makes changes of 1048576 x 1048576"),
        ({"glora_a1": UP, "glora_a2": ROW, "glora_b1": UP, "glora_b2": DOWN}, "of 2 x 1048576"),
        ({"oft_blocks": torch.ones(2, 1, LONG)}, "by blocks of 1 x 1048576"),  # minus its transpose it is square
        ({"oft_vectors": torch.ones(1, LONG)}, "rotates 1 x 1449 inputs"),
    ],
    ids=("LoRA", "LoHa", "GLoRA's addition", "GLoRA's product", "OFT", "PEFT's OFT"),
)
def test_a_change_of_another_shape_is_refused_before_it_is_computed(
    parts: dict[str, torch.Tensor], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        adapted(BASE, parts, None)


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(ValueError, match="no known form"):
        adapted(BASE, {"up": UP}, None)
