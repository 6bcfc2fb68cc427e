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

from fastsd.components import Components, TextualInversion
from fastsd.errors import FastsdError, named_arguments
from fastsd.files import check_path
from fastsd.model.layers import Conv2d
from fastsd.weights.adapters.arithmetic import adapted
from fastsd.weights.adapters.embeddings import read_bundled
from fastsd.weights.adapters.file import AdapterFile, AdapterLayer, layer_roles, read_adapter
from fastsd.weights.adapters.layer_names import layer_names
from fastsd.weights.adapters.ordered import named_layers
from fastsd.weights.adapters.roles import BIAS, SCALARS
from fastsd.weights.layouts.ldm_names import unet_key, unet_table
from fastsd.weights.layouts.names import Source, sources

MAX_STRENGTH = 100.0


@named_arguments
@dataclass(frozen=True)
class Adapter:
    """An adapter file and its strengths: 0 has no effect, 1 is as trained, negative values reverse the effect."""

    path: Path
    unet: float = 1.0
    text: float = 1.0

    def __post_init__(self) -> None:
        check_path(self.path)
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
        self._bundled: dict[str, TextualInversion | None] = {}  # of `active`, by name: what the name meant before

    @functools.cached_property
    def _targets(self) -> dict[Key, _AdapterTarget]:
        """Everything that an adapter can change: the rows of each stored tensor."""
        return {
            (network, target.source.key): target
            for network, module in _networks(self._components)
            for target in _targets(network, module)
        }

    @functools.cached_property
    def _names(self) -> dict[str, dict[str, str]]:
        """The folder's name of each layer by its network, by every name that files use for it.

        Only PEFT's folders of a text encoder have names that mean a layer of either.
        """
        names: dict[str, dict[str, str]] = {}
        table = unet_table(self._components.unet.config)
        for network, key in self._targets:
            layer = key.rpartition(".")[0]
            original = unet_key(table, key).key.rpartition(".")[0] if network == "unet" else None
            for name in layer_names(network, layer, original):
                names.setdefault(name, {})[network] = layer
        return names

    @torch.no_grad()
    def set(self, adapters: Sequence[Adapter], allow_partial: bool = False, allow_pickle: bool = False) -> list[str]:
        """Make `adapters` the only adapters in the weights.

        Args:
            adapters: any number; their changes add up. Each changes a weight W to W + strength * (W' - W), where W' is
                the weight that the file makes of the checkpoint's W.
            allow_partial: skip layers that the model does not have; otherwise they are an error.
            allow_pickle: read files that are pickles; only tensors and plain values are unpickled.

        Returns:
            Notes: what was skipped, one line per file; settings in the files that are not known.

        Raises:
            FastsdError: not an adapter, or not for this model; the weights are then unchanged.
        """
        if not isinstance(adapters, list | tuple) or not all(isinstance(adapter, Adapter) for adapter in adapters):
            raise FastsdError("it should be a list of fastsd.Adapter(path, unet, text)", argument="adapters")
        if adapters and any(weight.dtype == torch.uint8 for weight in self._components.unet.parameters()):
            raise FastsdError(
                "weights in fp8 take no adapters: load the model in another dtype", argument="adapters",
                path=adapters[0].path,
            )  # fmt: skip
        changes: Changes = {}
        bundled: dict[str, TextualInversion] = {}
        notes = []
        for adapter in adapters:
            file = read_adapter(adapter.path, allow_pickle)
            notes += file.notes
            unknown = self._collect(adapter, file, changes)
            bundled |= self._bundled_with(adapter, file)
            if unknown:
                text = f"{len(unknown)} of its layers are not in this model: {', '.join(unknown[:4])}" + (
                    ", ..." if len(unknown) > 4 else ""
                )
                if not allow_partial:
                    raise FastsdError(
                        f"{text}; is it for another model? {{allow_partial}} skips them", path=adapter.path
                    )
                notes.append(f"{adapter.path}: {text}")
        if changes or self._base:
            previous = self.active
            try:
                self._write(changes)
            except BaseException:
                self.active = ()
                self._write({})
                if previous:
                    self.set(previous, allow_partial=True, allow_pickle=True)
                raise
        self.active = tuple(adapters)
        self._bundle(bundled)
        return notes

    def _collect(self, adapter: Adapter, file: AdapterFile, changes: Changes) -> list[str]:
        """Add the layers of a file to `changes`; return the names of layers that the model does not have."""
        for strength in (adapter.unet, adapter.text):
            if not -MAX_STRENGTH <= strength <= MAX_STRENGTH:
                raise FastsdError(f"strength {strength:g}; it should be within ±{MAX_STRENGTH:g}", path=adapter.path)
        unknown = []
        for layer in [*file.layers, *self._named(adapter, file)]:
            found = self._places(layer)
            if found is None:
                unknown.append(f"{layer.name} (a bias)" if self._lacks_bias(layer) else layer.name)
                continue
            network, keys = found
            for key in keys:
                strength = adapter.unet if network == "unet" else adapter.text
                changes.setdefault(key, []).append((layer, str(adapter.path), strength))
        return unknown

    def _named(self, adapter: Adapter, file: AdapterFile) -> list[AdapterLayer]:
        """The layers of a file that come without names."""
        shapes: dict[str, dict[str, tuple[int, ...]]] = {}
        for (network, key), target in self._targets.items():
            layer, _, kind = key.rpartition(".")
            if kind == "weight":
                shapes.setdefault(network, {})[layer] = target.source.shape
        found = []
        for network, pairs in file.ordered:
            found += named_layers(network, pairs, shapes, adapter.path)
        return found

    def _places(self, layer: AdapterLayer) -> tuple[str, list[Key]] | None:
        """The network and the stored keys that a layer of a file changes, or None if the model lacks them."""
        networks = self._names.get(layer.name, {})
        if len(networks) > 1:  # the one whose sizes fit; where both do, the one that PEFT's config names
            fitting = {n: m for n, m in networks.items() if _fits(layer, self._targets.get((n, f"{m}.weight")))}
            networks = fitting or networks
            if layer.network in networks:
                networks = {layer.network: networks[layer.network]}
        for network, module in networks.items():
            kinds = layer_roles(layer)
            if kinds.get("bias") == ["factors"] and (network, f"{module}.bias") not in self._targets:
                del kinds["bias"]  # (IA)^3 scales a bias where there is one
            keys = [(network, f"{module}.{kind}") for kind in kinds]
            return (network, keys) if all(key in self._targets for key in keys) else None
        return None

    def _lacks_bias(self, layer: AdapterLayer) -> bool:
        """Whether the model has this layer, without the bias that the file changes (PEFT's `lora_bias`)."""
        modules = self._names.get(layer.name, {}).items()
        return "bias" in layer_roles(layer) and any((net, f"{name}.weight") in self._targets for net, name in modules)

    def _bundled_with(self, adapter: Adapter, file: AdapterFile) -> dict[str, TextualInversion]:
        """The embeddings that a file brings along, by name."""
        encoders = self._components.text_encoders
        return {
            name: TextualInversion((name,), read_bundled(adapter.path, entries, encoders))
            for name, entries in file.embeddings.items()
        }

    def _bundle(self, embeddings: dict[str, TextualInversion]) -> None:
        """Let prompts use these embeddings, and no longer those of the adapters before."""
        known = self._components.embeddings
        for name, before in self._bundled.items():
            if before is None:
                known.pop(name, None)
            else:
                known[name] = before
        self._bundled = {name: known.get(name) for name in embeddings}
        known |= embeddings

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
        roles = layer_roles(layer)[source.key.rpartition(".")[2]]
        for role in roles:
            dtype = layer.entries[role].dtype
            if dtype.is_complex or (role not in SCALARS and not dtype.is_floating_point):
                kind = str(dtype).removeprefix("torch.")
                raise FastsdError(f"{layer.name} has {role} in {kind}; it should be a floating-point tensor", path=path)
        parts = {role.removeprefix(BIAS): layer.entries[role].read().float().to(base.device) for role in roles}
        try:
            changed = adapted(weight, parts, layer.scale, layer.options)
        except (RuntimeError, ValueError) as error:
            shapes = ", ".join(f"{role} {list(layer.entries[role].shape)}" for role in roles)
            raise FastsdError(
                f"{layer.name} ({shapes}) does not fit the model's {list(source.shape)}", path=path
            ) from error
        if not bool(changed.isfinite().all()):
            raise FastsdError(f"{layer.name} holds NaN or infinite values", path=path)
        total += strength * (changed - weight)
    return total


def _fits(layer: AdapterLayer, target: _AdapterTarget | None) -> bool:
    """Whether a LoRA of linear layers has the sizes of a target; other kinds are taken to fit."""
    up, down = layer.entries.get("up"), layer.entries.get("down")
    if target is None or up is None or down is None:
        return target is not None
    return up.shape[:1] == target.source.shape[:1] and down.shape[1:2] == target.source.shape[1:2]


def _networks(components: Components) -> Iterator[tuple[str, nn.Module]]:
    yield "unet", components.unet
    yield from zip(("text_encoder", "text_encoder_2"), components.text_encoders)


def _targets(network: str, module: nn.Module) -> Iterator[_AdapterTarget]:
    for name, _, parts in sources(module):
        path, _, kind = name.rpartition(".")
        for source in parts:
            yield _AdapterTarget(network, module.get_submodule(path), kind, source)
