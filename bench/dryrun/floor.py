"""The floor of a section: the least work of the layers that ran in it, as `bench.roofline` counts it, by kind."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from bench.ceilings import Ceilings
from bench.roofline import COUNTS, Work
from fastsd.model import layers

# The kinds of a dry run's launches; what has none there (a bias, a copy) is no work of its own.
KIND_OF = {"conv": "convolution", "linear": "linear", "attention": "attention"}


@dataclass
class Floors:
    """The work of layers, by kind of launch."""

    work: list[tuple[str, Work]] = field(default_factory=list)

    def add(self, layer: nn.Module, args: Any, named: dict[str, Any], out: torch.Tensor) -> None:
        """Add the work of a layer that ran."""
        kind = next((cls for cls in type(layer).__mro__ if cls in COUNTS), None)
        if kind is None:
            return
        work = COUNTS[kind](layer, args, named, out)
        if work is not None:
            norm = "group norm" if isinstance(layer, layers.GroupNorm) else "layer norm"
            self.work.append((KIND_OF.get(work.kind, norm), work))

    def bytes(self, itemsize: int) -> float:
        """Bytes moved by all of it, with elements of `itemsize` bytes."""
        return sum(work.elements for _, work in self.work) * itemsize

    def seconds(self, ceilings: Ceilings, itemsize: int) -> dict[str, float]:
        """The least time by kind."""
        found: dict[str, float] = {}
        for kind, work in self.work:
            found[kind] = found.get(kind, 0.0) + work.floor(ceilings, itemsize)
        return found
