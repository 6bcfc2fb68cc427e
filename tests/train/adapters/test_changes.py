"""What a trainable change computes on activations is the product with the matrix that the file's reader makes of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastsd.train.adapters.changes import KINDS, KroneckerChange, WeightChange, factors
from fastsd.weights.adapters.arithmetic import adapted

SHAPES = {"matrix": (48, 40), "convolution": (24, 16, 3, 3)}


def change(kind: str, shape: tuple[int, ...], rank: int = 3) -> WeightChange:
    """A random change in float64."""
    place = {"stride": 2, "padding": (1, 1, 1, 1)} if len(shape) == 4 else {}
    made = KINDS[kind](shape, rank, 2.0, torch.Generator().manual_seed(0), **place).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return made


def apply_matrix(made: WeightChange, x: torch.Tensor) -> torch.Tensor:
    weight = made.matrix()
    if weight.ndim == 2:
        return F.linear(x, weight)
    return F.conv2d(x.permute(0, 3, 1, 2), weight, stride=2, padding=1).permute(0, 2, 3, 1)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("rank", [3, 64], ids=["low", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradients_are_those_of_the_matrix(kind: str, rank: int, shape: tuple[int, ...]) -> None:
    """In float64: sums of up to 64 * 144 terms, each rounded by 2^-53, of results of the size of the sums."""
    made = change(kind, shape, rank)
    x = torch.randn(2, 6, 5, shape[1], generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x.requires_grad_()
    y, expected = made.output(x), apply_matrix(made, x)
    bound = 64 * 144 * 2.0**-53 * float(expected.detach().abs().max())
    assert float((y - expected).detach().abs().max()) < bound
    seeds = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    inputs = [x, *made.parameters()]
    for ours, theirs in zip(torch.autograd.grad(y, inputs, seeds), torch.autograd.grad(expected, inputs, seeds)):
        assert float((ours - theirs).abs().max()) < 64 * 144 * 2.0**-53 * float(theirs.abs().max())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("rank", [3, 64], ids=["low", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_reader_makes_the_same_matrix(kind: str, rank: int, shape: tuple[int, ...]) -> None:
    made = change(kind, shape, rank)
    parts = made.tensors() | {"alpha": torch.tensor(rank * made.scale)}
    found = adapted(torch.zeros(shape, dtype=torch.float64), parts, None)
    assert torch.allclose(found, made.matrix(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_change_is_zero(kind: str) -> None:
    made = KINDS[kind]((48, 40), 4, 1.0, torch.Generator().manual_seed(0))
    assert not made.matrix().any()
    assert not made.output(torch.randn(1, 40)).any()


@pytest.mark.parametrize(
    "size, factor, expected",
    [
        (320, -1, (16, 20)),
        (1280, -1, (32, 40)),
        (127, -1, (1, 127)),
        (250, 8, (5, 50)),
        (128, 4, (4, 32)),
        (12, 16, (3, 4)),
    ],
)
def test_factors(size: int, factor: int, expected: tuple[int, int]) -> None:
    assert factors(size, factor) == expected


def test_a_kronecker_product_is_small() -> None:
    made = KroneckerChange((1280, 1280), 4, 4.0, torch.Generator().manual_seed(0), factor=8)
    assert sum(parameter.numel() for parameter in made.parameters()) == 8 * 8 + 2 * 4 * 160
