"""Which layers an adapter changes: groups of layers by name, as other trainers have them, and patterns."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from fastsd.components import Components
from fastsd.errors import FastsdError, nearest
from fastsd.model.layers import Conv2d, Linear
from fastsd.weights.adapters.layer_patterns import layer_matcher
from fastsd.weights.layouts.names import Source, sources

T = TypeVar("T")
_ATTENTION = r"(.*\.)?(attn[12]\.to_(q|k|v|out\.0)|self_attn\.(q|k|v|out)_proj)"
_FEEDFORWARD = r"(.*\.)?(ff\.net\.(0\.proj|2)|mlp\.fc[12])"
_PROJECTION = r"(.*\.)?attentions\.\d+\.proj_(in|out)"
# The groups: by the name of the layer, and by the number of dimensions of its weight.
_GROUPS = {
    "attention": (_ATTENTION, (2,)),  # what diffusers' and PEFT's examples train
    "transformer": (f"{_ATTENTION}|{_FEEDFORWARD}|{_PROJECTION}", (2,)),  # what kohya's trainer trains
    "linear": (".*", (2,)),
    "convolution": (".*", (4,)),
}
GROUPS = tuple(_GROUPS)
NETWORKS = ("unet", "text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class LayerTarget:
    """One stored matrix or convolution of a network.

    Attributes:
        network: a name of `NETWORKS`.
        name: of the layer in a diffusers folder, without the network's.
        owner: the layer that holds it, with others where it stacks several.
        path: the owner's name in the network.
        source: its rows in the owner's weight.
    """

    network: str
    name: str
    owner: Linear | Conv2d
    path: str
    source: Source


def candidates(components: Components) -> Iterator[LayerTarget]:
    """Every layer that an adapter can change."""
    networks: list[tuple[str, nn.Module]] = [(NETWORKS[0], components.unet)]
    for network, module in [*networks, *zip(NETWORKS[1:], components.text_encoders)]:
        for name, _, parts in sources(module):
            path, _, kind = name.rpartition(".")
            owner = module.get_submodule(path)
            if kind == "weight" and isinstance(owner, Linear | Conv2d):
                for source in parts:
                    yield LayerTarget(network, source.key.rpartition(".")[0], owner, path, source)


def chosen(components: Components, networks: Sequence[str], targets: Sequence[str]) -> list[LayerTarget]:
    """The layers of `networks` that any of `targets` names.

    Args:
        networks: names of `NETWORKS`.
        targets: groups of `GROUPS`; or the end of layers' names ("attn2.to_k"), or a regular expression of it, as in
            PEFT's `target_modules`.

    Raises:
        FastsdError: a network that the model lacks, or a target that names no layer.
    """
    everything = list(candidates(components))
    present = list(dict.fromkeys(target.network for target in everything))
    for network in networks:
        if network not in present:
            raise FastsdError(
                f"{network!r} is no network of this model; it has {', '.join(present)}", argument="networks"
            )
    within = [target for target in everything if target.network in networks]
    found: dict[int, LayerTarget] = {}
    for text in targets:
        matched = {id(target.source): target for target in within if _matches(text, target)}
        if not matched:
            raise FastsdError(_unknown(text, within, networks), argument="targets")
        found |= matched
    if not found:
        raise FastsdError(f"empty; it should name layers, for example {GROUPS[0]!r}", argument="targets")
    return [target for target in within if id(target.source) in found]


def by_pattern(argument: str, table: Mapping[str, T], targets: Sequence[LayerTarget]) -> dict[str, T]:
    """The value of each layer that a pattern of the table names, by network and name; a later pattern wins.

    Raises:
        FastsdError: a pattern that names no layer of the adapter.
    """
    values: dict[str, T] = {}
    for text, value in table.items():
        matched = [target for target in targets if _matches(text, target)]
        if not matched:
            raise FastsdError(_unknown(text, targets, ("the adapter",)), argument=argument)
        values |= {f"{target.network}.{target.name}": value for target in matched}
    return values


def _matches(text: str, target: LayerTarget) -> bool:
    if text in _GROUPS:
        pattern, dimensions = _GROUPS[text]
        return len(target.source.shape) in dimensions and re.fullmatch(pattern, target.name) is not None
    try:
        matcher = layer_matcher(text)
    except ValueError as error:
        raise FastsdError(f"the pattern {text[:60]!r} {error}", argument="targets") from error
    return matcher(target.name) or matcher(f"{target.network}.{target.name}")


def _unknown(text: str, targets: Sequence[LayerTarget], networks: Sequence[str]) -> str:
    names = {".".join(target.name.split(".")[-count:]) for target in targets for count in (1, 2, 3)}
    where = " and ".join(networks)
    known = f"it should be {', '.join(GROUPS)}, or the end of a layer's name"
    return f"{text[:60]!r} names no layer of {where}{nearest(text, [*GROUPS, *names])}; {known}"
