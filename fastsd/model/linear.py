"""The layer of a matrix, in the dtype of the network or in fp8."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import nn

from fastsd.kernels.add_product import add_product
from fastsd.kernels.linear import activate, linear
from fastsd.kernels.linear_fp8 import FP8, linear_fp8, quantize

# A layer's own product: of an input, with a bias and a sum to add, either of which may be None.
Product = Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor | None], torch.Tensor]


class LayerChange(Protocol):
    """What an adapter in training makes of a layer: called with its input, its own product, and the bias to add."""

    def __call__(self, x: torch.Tensor, product: Product, bias: torch.Tensor | None) -> torch.Tensor: ...


class Linear(nn.Module):
    """`activation(x W^T + b) + residual`.

    Args:
        in_features, out_features: K and N.
        bias: whether it adds a bias.
        parts: the checkpoint's names of the matrices that are stacked in this one, in order; siblings of this layer.
        part_sizes: their row counts; equal shares by default.

    Attributes:
        scale: the bits of the scales of the weight's rows, `[out_features]`, after `quantize`; otherwise None.
        change: of an adapter in training (`fastsd.train.adapters`), which is no part of the module; or None.
    """

    scale: torch.Tensor | None
    change: LayerChange | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        parts: tuple[str, ...] = (),
        part_sizes: tuple[int, ...] = (),
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(out_features, dtype=torch.float32)) if bias else None
        self.register_buffer("scale", None)
        self.parts = parts
        self.part_sizes = part_sizes or (out_features // max(len(parts), 1),) * len(parts)
        init_uniform(self.weight, self.bias)

    def forward(
        self,
        x: torch.Tensor,
        activation: str = "none",
        residual: torch.Tensor | None = None,
        skip: torch.Tensor | None = None,
        into: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """With `into`, which includes the bias, adds the product to it, in place except in fp8; `bias` replaces the
        layer's own."""
        own = self.bias if bias is None else bias
        if self.change is not None:
            x = x if skip is None else torch.cat([x, skip], dim=-1)
            added, own = (residual, own) if into is None else (into, None)
            y = activate(self.change(x, self._product, own), activation)
            return y if added is None else y + added
        if self.scale is not None:
            added, own = (residual, own) if into is None else (into, None)
            return linear_fp8(x, *self.in_fp8(), own, activation, added, skip)
        if into is None:
            return linear(x, self.weight, own, activation, residual, skip)
        add_product(into, x, self.weight)
        return into

    def _product(self, x: torch.Tensor, bias: torch.Tensor | None, added: torch.Tensor | None) -> torch.Tensor:
        return linear(x, self.weight, bias, residual=added)

    def quantize(self) -> None:
        """Compute in fp8 from now on. Weight and scales are kept as integers, which no change of dtype touches."""
        values, scale = quantize(self.weight.detach())
        self.weight, self.scale = nn.Parameter(values.view(torch.uint8), requires_grad=False), scale.view(torch.int32)

    def in_fp8(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The weight in e4m3 and the scales of its rows in fp32, after `quantize`."""
        assert self.scale is not None
        return self.weight.view(FP8), self.scale.view(torch.float32)


def init_uniform(weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """PyTorch's default for linear and convolution layers: uniform within 1 / sqrt(fan in)."""
    bound = weight[0].numel() ** -0.5
    for parameter in (weight, bias):
        if parameter is not None and not parameter.is_meta:
            nn.init.uniform_(parameter, -bound, bound)
