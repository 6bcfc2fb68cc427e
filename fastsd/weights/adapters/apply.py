"""Adapters in a loaded checkpoint: put into the weights in place, and taken out again to the bit.

The engine's weights are fused (q, k and v in one matrix) and may be captured in graphs, so their memory stays where it
is: the rows that an adapter touches are kept aside and rewritten.
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
from fastsd.weights.adapters.file import Layer, names, read_adapter
from fastsd.weights.layouts.ldm_names import unet_place, unet_table
from fastsd.weights.layouts.names import Source, sources

MAX_STRENGTH = 100.0


@dataclass(frozen=True)
class Adapter:
    """One file and how strongly it acts; 0 not at all, 1 as trained, negative values turn away from it."""

    path: Path
    unet: float = 1.0
    text: float = 1.0


@dataclass(frozen=True)
class _Target:
    """A run of rows of one parameter: what a layer of a file can change."""

    component: str
    owner: nn.Module
    parameter: str  # its name in `owner`
    source: Source

    def rows(self) -> torch.Tensor:
        """The rows as they are, `source.shape`; not of a packed weight."""
        return getattr(self.owner, self.parameter).detach()[self.source.rows]


Key = tuple[str, str]  # component and the stored key, which is unique in it


class Adapters:
    """The adapters of one checkpoint.

    Attributes:
        active: what is in the weights now, in the order given.
    """

    def __init__(self, components: Components):
        self.active: tuple[Adapter, ...] = ()
        self._components = components
        self._base: dict[Key, torch.Tensor] = {}

    @functools.cached_property
    def _targets(self) -> dict[Key, _Target]:
        """What can be changed: each stored tensor's rows."""
        return {
            (component, target.source.key): target
            for component, module in _modules(self._components)
            for target in _targets(component, module)
        }

    @functools.cached_property
    def _names(self) -> dict[str, tuple[str, str]]:
        """Each name of a layer in files, with its component and its name in a folder."""
        found: dict[str, tuple[str, str]] = {}
        table = unet_table(self._components.unet.config)
        for component, key in self._targets:
            layer = key.rpartition(".")[0]
            ldm = unet_place(table, key).key.rpartition(".")[0] if component == "unet" else None
            for name in names(component, layer, ldm):
                found.setdefault(name, (component, layer))
        return found

    @torch.no_grad()
    def set(self, wanted: Sequence[Adapter], allow_partial: bool = False) -> list[str]:
        """Make `wanted` the adapters that are in the weights; what was in them and is not wanted is taken out.

        Args:
            wanted: any number, added up. Each changes a weight W to W + strength * (W' - W), W' being what the file
                makes of the checkpoint's W.
            allow_partial: leave out layers that the model does not have; otherwise they are an error.

        Returns:
            Notes: what was left out, a line for each file.

        Raises:
            FastsdError: no adapter, or not one for this model; the weights are then as before.
        """
        changes: dict[Key, list[tuple[Layer, str, float]]] = {}
        notes = []
        for adapter in wanted:
            strangers = self._collect(adapter, changes)
            if strangers:
                text = (
                    f"{adapter.path}: {len(strangers)} of its layers are not in this model: {', '.join(strangers[:4])}"
                    + (", ..." if len(strangers) > 4 else "")
                )
                if not allow_partial:
                    raise FastsdError(f"{text}; is it for another model? --allow-partial leaves them out")
                notes.append(text)
        if not changes and not self._base:
            self.active = tuple(wanted)
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
        self.active = tuple(wanted)
        return notes

    def _collect(self, adapter: Adapter, changes: dict[Key, list[tuple[Layer, str, float]]]) -> list[str]:
        """Enter the layers of a file by what they change; returns the names that match nothing."""
        for strength in (adapter.unet, adapter.text):
            if not -MAX_STRENGTH <= strength <= MAX_STRENGTH:
                raise FastsdError(f"{adapter.path}: strength {strength:g}; it should be within ±{MAX_STRENGTH:g}")
        strangers = []
        for layer in read_adapter(adapter.path):
            component, module = self._names.get(layer.name, ("", ""))
            kinds = [kind for kind, roles in _kinds(layer).items() if roles]
            known = [(component, f"{module}.{kind}") for kind in kinds]
            if not component or not all(key in self._targets for key in known):
                strangers.append(layer.name)
                continue
            for key in known:
                strength = adapter.unet if component == "unet" else adapter.text
                changes.setdefault(key, []).append((layer, str(adapter.path), strength))
        return strangers

    def _write(self, changes: dict[Key, list[tuple[Layer, str, float]]]) -> None:
        """Rewrite every row that is changed, or was."""
        for key in [*self._base, *(key for key in changes if key not in self._base)]:
            target = self._targets[key]
            if isinstance(target.owner, Conv2d):
                target.owner.unpack()  # it is packed again at its next call
            base = self._base.setdefault(key, target.rows().clone())
            if key in changes:
                target.rows().copy_(_sum(base, target.source, changes[key]))
            else:
                target.rows().copy_(base)
        for key in [key for key in self._base if key not in changes]:
            del self._base[key]


def _sum(base: torch.Tensor, source: Source, changes: list[tuple[Layer, str, float]]) -> torch.Tensor:
    """base + the strength-weighted changes, in fp32."""
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
                f"{path}: {layer.name} ({shapes}) does not fit the model's {list(source.shape)}"
            ) from error
        if not bool(changed.isfinite().all()):
            raise FastsdError(f"{path}: {layer.name} holds NaN or infinite values")
        total += strength * (changed - weight)
    return total


def _kinds(layer: Layer) -> dict[str, list[str]]:
    """The roles that change a layer's weight, and those that change its bias."""
    bias = [role for role in layer.entries if role == "bias_difference"]
    return {"weight": [role for role in layer.entries if role not in bias], "bias": bias}


def _modules(components: Components) -> Iterator[tuple[str, nn.Module]]:
    yield "unet", components.unet
    yield from zip(("text_encoder", "text_encoder_2"), components.text_encoders)


def _targets(component: str, module: nn.Module) -> Iterator[_Target]:
    for name, _, parts in sources(module):
        path, _, kind = name.rpartition(".")
        for source in parts:
            yield _Target(component, module.get_submodule(path), kind, source)
