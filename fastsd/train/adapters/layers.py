"""An adapter on one layer of a model, which may stack several of the checkpoint's matrices."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import nn

from fastsd.kernels.cpu import onednn
from fastsd.model.layers import Conv2d, Linear
from fastsd.model.linear import Product
from fastsd.train.adapters.changes import WeightChange


class AdaptedRows(nn.Module):
    """The change of some rows of a layer's weight, with DoRA's magnitude of each row or without.

    DoRA (Liu et al. 2024, equation 5): W' = m (W + change) / norm(W + change), with a norm of each output. As in the
    paper's section 4.3, the norm counts as a constant in the backward pass.

    Args:
        rows: of the layer's weight.
        weight: those rows, for DoRA, whose magnitude begins as their norm; None: without DoRA.
    """

    def __init__(self, change: WeightChange, rows: slice, weight: torch.Tensor | None):
        super().__init__()
        self.change, self.rows = change, rows
        norm = None if weight is None else weight.detach().float().flatten(1).norm(dim=1)
        self.magnitude = None if norm is None else nn.Parameter(norm)

    def gain(self, weight: torch.Tensor) -> torch.Tensor:
        """What multiplies each output `[rows]`, given the rows of the layer's weight."""
        assert self.magnitude is not None
        with torch.no_grad():
            norm = (weight.float() + self.change.matrix()).flatten(1).norm(dim=1)
        return self.magnitude / norm


class MaskSeed:
    """The seed of the dropout's masks in a step: of each thread that computes a part of the batch.

    A mask depends on seed and layer alone, so that a forward pass that is computed again (gradient checkpointing) has
    the same one. On a GPU the backward pass runs in a thread of its own, which takes the seed that was set last.
    """

    def __init__(self) -> None:
        self._own = threading.local()
        self._last: int | None = None

    def __reduce__(self) -> tuple[type[MaskSeed], tuple[()]]:
        return MaskSeed, ()  # a copy of an adapter has masks of its own

    def set(self, seed: int | None) -> None:
        self._own.seed = self._last = seed

    def get(self) -> int | None:
        return getattr(self._own, "seed", self._last)


class AdaptedLayer(nn.Module):
    """All changes of one layer; `forward` is the layer's `change` while the adapter is on.

    Args:
        layer: a `Linear` or `Conv2d`, which keeps its parameters.
        parts: the changes, by ascending rows; rows that none of them changes stay as they are.
        dropout: the share of the input's elements that the change does not see, in training, as PEFT's.

    Attributes:
        masks: the seed of the dropout's masks; without one, nothing is dropped.
        number: of the layer in its adapter: the layers have different masks.
    """

    def __init__(
        self, layer: Linear | Conv2d, parts: Sequence[AdaptedRows], dropout: float, masks: MaskSeed, number: int
    ):
        super().__init__()
        self.__dict__["layer"] = layer  # no submodule: its parameters are not the adapter's
        self.parts = nn.ModuleList(parts)
        self.dropout, self.masks, self.number = dropout, masks, number

    def forward(self, x: torch.Tensor, product: Product, bias: torch.Tensor | None) -> torch.Tensor:
        """The adapted layer's product of `x`, plus `bias`."""
        seen = self._dropped(x)
        outputs = [part.change.output(seen) for part in self._parts()]
        added = self._joined(outputs, 0.0)
        if all(part.magnitude is None for part in self._parts()):
            return product(x, bias, added)
        weight = onednn.dense(self._layer().weight.detach())
        gains = [part.gain(weight[part.rows]).to(x.dtype) for part in self._parts()]
        y = product(x, None, added) * self._joined(gains, 1.0)
        return y if bias is None else y + bias

    def attach(self) -> None:
        self._layer().change = self.forward

    def detach(self) -> None:
        self._layer().change = None

    def _layer(self) -> Linear | Conv2d:
        return self.__dict__["layer"]

    def _parts(self) -> list[AdaptedRows]:
        return list(self.parts)  # type: ignore[arg-type]

    def _joined(self, pieces: list[torch.Tensor], fill: float) -> torch.Tensor:
        """The pieces, `[..., rows]` each, at their rows of `[..., out]`; `fill` at the others."""
        joined, row = [], 0
        total = len(self._layer().weight)
        for part, piece in zip(self._parts(), pieces, strict=True):
            start, stop, _ = part.rows.indices(total)
            if start > row:
                joined.append(piece.new_full((*piece.shape[:-1], start - row), fill))
            joined.append(piece)
            row = stop
        if row < total:
            joined.append(pieces[0].new_full((*pieces[0].shape[:-1], total - row), fill))
        return joined[0] if len(joined) == 1 else torch.cat(joined, dim=-1)

    def _dropped(self, x: torch.Tensor) -> torch.Tensor:
        seed = self.masks.get()
        if not self.dropout or seed is None or not self.training:
            return x
        generator = torch.Generator(x.device).manual_seed((seed * 1_000_003 + self.number) % 2**63)
        kept = torch.rand(x.shape, generator=generator, device=x.device, dtype=torch.float32) >= self.dropout
        return x * kept.to(x.dtype) / (1 - self.dropout)
