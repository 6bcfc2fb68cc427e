"""Moments of maps, taken by the op that wrote the map, for the group norm that reads it next.

A norm of a large map reads it twice, once for its moments. The pass that finishes a convolution has the map in
registers, so it takes them at the cost of a few bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.weak import WeakIdKeyDictionary

GROUPS = 32  # of the channels: those of every norm of Stable Diffusion


@dataclass(frozen=True)
class MapMoments:
    """Moments of a map `[B, H, W, C]` over runs of pixels.

    Attributes:
        values: `[B, 2, runs, GROUPS]` fp32: means, then sums of squared deviations from them.
        run: pixels of a run, in the map's order; the last run of an image may be shorter.
    """

    values: torch.Tensor
    run: int


_known: WeakIdKeyDictionary = WeakIdKeyDictionary()  # by map, as long as it lives


def note(x: torch.Tensor, moments: MapMoments) -> None:
    """Note the moments of `x`, which nothing changes any more."""
    _known[x] = moments


def of(x: torch.Tensor) -> MapMoments | None:
    """The moments of this very tensor, if the op that wrote it took them; a copy or a view has none."""
    return _known.get(x)
