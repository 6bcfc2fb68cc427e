"""PEFT's adapters in a host: which are active, and the weights that they make of a layer's."""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import nn

from fastsd.diffusers.packed import give_back


def is_adapted(module: nn.Module) -> bool:
    """Whether PEFT has wrapped this layer; without PEFT imported, it has wrapped none."""
    peft = sys.modules.get("peft.tuners.tuners_utils")
    return peft is not None and isinstance(module, peft.BaseTunerLayer)


def base_of(module: Any) -> Any:
    """The layer below PEFT's, or the layer itself."""
    while is_adapted(module):
        module = module.base_layer
    return module


def state_of(layer: Any) -> Hashable:
    """Equal as long as the adapters of a layer make the same weight.

    The sums notice what is copied into an adapter in place, as a hot swap does; it leaves no other trace.
    """
    if not is_active(layer):
        return None
    active = tuple(name for name in layer.active_adapters if _has(layer, name))
    sums = [float(t.detach().sum()) for name in active for t in _tensors(layer, name)]
    return active, tuple(_scaling(layer, name) for name in active), tuple(sums)


def is_active(layer: Any) -> bool:
    """Whether a call of the layer adds what an adapter computes."""
    return not layer.disable_adapters and not layer.merged and any(_has(layer, n) for n in layer.active_adapters)


def _has(layer: Any, name: str) -> bool:
    return any(name in getattr(layer, attribute) for attribute in layer.adapter_layer_names)


def _tensors(layer: Any, name: str) -> Iterator[torch.Tensor]:
    for attribute in layer.adapter_layer_names:
        held = getattr(layer, attribute)
        if name in held:
            part = held[name]
            yield from part.parameters() if isinstance(part, nn.Module) else (part,)


def _scaling(layer: Any, name: str) -> float:
    """To 6 digits: diffusers multiplies it before a call and divides it again afterwards."""
    return float(f"{float(getattr(layer, 'scaling', {}).get(name, 1.0)):.6e}")


@torch.no_grad()
def merged(layer: Any) -> dict[str, torch.Tensor]:
    """The parameters that the active adapters make of the base layer's, by PEFT's own arithmetic; nothing is changed.

    Raises:
        Exception: as PEFT does, where this kind of adapter cannot be merged.
    """
    base, active = give_back(layer.get_base_layer()), [name for name in layer.active_adapters if _has(layer, name)]
    kept = {kind: (p, p.data) for kind, p in base._parameters.items() if p is not None}
    try:
        for parameter, data in kept.values():
            parameter.data = data.clone(memory_format=torch.preserve_format)
        layer.merge(adapter_names=active)
        return {kind: parameter.data for kind, (parameter, _) in kept.items()}
    finally:
        for parameter, data in kept.values():
            parameter.data = data
        layer.merged_adapters.clear()
        getattr(layer, "_caches", {}).clear()
