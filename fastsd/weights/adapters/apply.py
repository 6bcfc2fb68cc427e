"""Adapters in a loaded checkpoint: merged into the weights in place, and removed again bit for bit.

The engine's weights are fused (q, k and v in one matrix) and CUDA graphs may hold their addresses, so they are never
reallocated: the original rows that an adapter changes are saved, and the rows are rewritten.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fastsd.components import Components
from fastsd.errors import FastsdError
from fastsd.model.layers import Conv2d
from fastsd.weights.adapters.arithmetic import adapted
from fastsd.weights.adapters.file import AdapterLayer, layer_names, read_adapter
from fastsd.weights.layouts.ldm_names import unet_key, unet_table
from fastsd.weights.layouts.names import Source, sources

MAX_STRENGTH = 100.0


@dataclass(frozen=True)
class Adapter:
    """An adapter file and its strengths: 0 has no effect, 1 is as trained, negative values reverse the effect."""

    path: Path
    unet: float = 1.0
    text: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))  # a text is a path too


@dataclass(frozen=True)
class _AdapterTarget:
    """The rows of one parameter that a layer of a file can change."""

    network: str
    owner: nn.Module
    parameter: str  # its name in `owner`
    source: Source

    def rows(self) -> torch.Tensor:
        """The current rows, with `source.shape`. The weight must not be packed."""
        return getattr(self.owner, self.parameter).detach()[self.source.rows]


Key = tuple[str, str]  # network and stored key
Changes = dict[Key, list[tuple[AdapterLayer, str, float]]]  # layers that change a key, each with its file and strength


class Adapters:
    """The adapters of one checkpoint.

    Attributes:
        active: the adapters in the weights now, in the order given.
    """

    def __init__(self, components: Components):
        self.active: tuple[Adapter, ...] = ()
        self._components = components
        self._base: dict[Key, torch.Tensor] = {}

    @functools.cached_property
    def _targets(self) -> dict[Key, _AdapterTarget]:
        """Everything that an adapter can change: the rows of each stored tensor."""
        return {
            (network, target.source.key): target
            for network, module in _networks(self._components)
            for target in _targets(network, module)
        }

    @functools.cached_property
    def _names(self) -> dict[str, tuple[str, str]]:
        """The network and the folder's name of each layer, by every name that files use for it."""
        names: dict[str, tuple[str, str]] = {}
        table = unet_table(self._components.unet.config)
        for network, key in self._targets:
            layer = key.rpartition(".")[0]
            original = unet_key(table, key).key.rpartition(".")[0] if network == "unet" else None
            for name in layer_names(network, layer, original):
                names.setdefault(name, (network, layer))
        return names

    @torch.no_grad()
    def set(self, adapters: Sequence[Adapter], allow_partial: bool = False) -> list[str]:
        """Make `adapters` the only adapters in the weights.

        Args:
            adapters: any number; their changes add up. Each changes a weight W to W + strength * (W' - W), where W' is
                the weight that the file makes of the checkpoint's W.
            allow_partial: skip layers that the model does not have; otherwise they are an error.

        Returns:
            Notes: what was skipped, one line per file.

        Raises:
            FastsdError: not an adapter, or not for this model; the weights are then unchanged.
        """
        changes: Changes = {}
        notes = []
        for adapter in adapters:
            unknown = self._collect(adapter, changes)
            if unknown:
                text = f"{len(unknown)} of its layers are not in this model: {', '.join(unknown[:4])}" + (
                    ", ..." if len(unknown) > 4 else ""
                )
                if not allow_partial:
                    raise FastsdError(
                        f"{text}; is it for another model? {{allow_partial}} skips them", path=adapter.path
                    )
                notes.append(f"{adapter.path}: {text}")
        if not changes and not self._base:
            self.active = tuple(adapters)
            return notes
        previous = self.active
        try:
            self._write(changes)
        except BaseException:
            self.active = ()
            self._write({})
            if previous:
                self.set(previous, allow_partial=True)
            raise
        self.active = tuple(adapters)
        return notes

    def _collect(self, adapter: Adapter, changes: Changes) -> list[str]:
        """Add the layers of a file to `changes`; return the names of layers that the model does not have."""
        for strength in (adapter.unet, adapter.text):
            if not -MAX_STRENGTH <= strength <= MAX_STRENGTH:
                raise FastsdError(f"strength {strength:g}; it should be within ±{MAX_STRENGTH:g}", path=adapter.path)
        unknown = []
        for layer in read_adapter(adapter.path):
            network, module = self._names.get(layer.name, ("", ""))
            kinds = [kind for kind, roles in _kinds(layer).items() if roles]
            keys = [(network, f"{module}.{kind}") for kind in kinds]
            if not network or not all(key in self._targets for key in keys):
                unknown.append(layer.name)
                continue
            for key in keys:
                strength = adapter.unet if network == "unet" else adapter.text
                changes.setdefault(key, []).append((layer, str(adapter.path), strength))
        return unknown

    def _write(self, changes: Changes) -> None:
        """Rewrite every row that `changes` changes or that an earlier call changed."""
        for key in [*self._base, *(key for key in changes if key not in self._base)]:
            target = self._targets[key]
            if isinstance(target.owner, Conv2d):
                target.owner.unpack()  # its next call packs it again
            base = self._base.setdefault(key, target.rows().clone())
            if key in changes:
                target.rows().copy_(_sum(base, target.source, changes[key]))
            else:
                target.rows().copy_(base)
        for key in [key for key in self._base if key not in changes]:
            del self._base[key]


def _sum(base: torch.Tensor, source: Source, changes: list[tuple[AdapterLayer, str, float]]) -> torch.Tensor:
    """The base plus the changes, each times its strength, in fp32."""
    weight = base.float()
    total = weight.clone()
    for layer, path, strength in changes:
        roles = _kinds(layer)[source.key.rpartition(".")[2]]
        parts = {role.removeprefix("bias_"): layer.entries[role].read().float().to(base.device) for role in roles}
        try:
            changed = adapted(weight, parts, layer.scale)
        except (RuntimeError, ValueError) as error:
            shapes = ", ".join(f"{role} {list(layer.entries[role].shape)}" for role in roles)
            raise FastsdError(
                f"{layer.name} ({shapes}) does not fit the model's {list(source.shape)}", path=path
            ) from error
        if not bool(changed.isfinite().all()):
            raise FastsdError(f"{layer.name} holds NaN or infinite values", path=path)
        total += strength * (changed - weight)
    return total


def _kinds(layer: AdapterLayer) -> dict[str, list[str]]:
    """The roles that change the layer's weight, and those that change its bias."""
    bias = [role for role in layer.entries if role == "bias_difference"]
    return {"weight": [role for role in layer.entries if role not in bias], "bias": bias}


def _networks(components: Components) -> Iterator[tuple[str, nn.Module]]:
    yield "unet", components.unet
    yield from zip(("text_encoder", "text_encoder_2"), components.text_encoders)


def _targets(network: str, module: nn.Module) -> Iterator[_AdapterTarget]:
    for name, _, parts in sources(module):
        path, _, kind = name.rpartition(".")
        for source in parts:
            yield _AdapterTarget(network, module.get_submodule(path), kind, source)
