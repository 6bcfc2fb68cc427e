"""Adapter files (LoRA and its variants): which tensors change which layer, whichever program wrote the file.

A key in a file is a layer's name followed by a tensor's role (`roles.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from fastsd.errors import FastsdError
from fastsd.weights.adapters.locate import AdapterPart, adapter_parts
from fastsd.weights.adapters.peft_config import METADATA, Configs, check_config, configs_in, options_of, scale_of
from fastsd.weights.adapters.roles import NO_OPTIONS, LayerOptions, split_key, unsupported
from fastsd.weights.formats.json_file import read_json
from fastsd.weights.formats.open_file import read_tensors
from fastsd.weights.formats.safetensors_file import TensorEntry

KINDS = "LoRA, LoHa, LoKr, DoRA, GLoRA, OFT, BOFT, IA3 or a difference"
BUNDLED = "bundle_emb."  # begins the keys of embeddings that a LoRA brings along, as kohya's and OneTrainer's users do
Pair = dict[str, TensorEntry]  # up and down, by role
# cloneofsimo's keys: of a layer, by its place; and of an embedding, which the metadata marks.
_ORDERED = re.compile(r"(unet|text_encoder):([0-9]{1,5}):(up|down)")
_EMBEDDING_MARK = "<embed>"
# PEFT's names for a whole model, before the layer's own.
_PEFT_PREFIX = re.compile(r"^(base_model\.model\.|(unet|text_encoder(_2)?)\.)+")


@dataclass(frozen=True)
class AdapterLayer:
    """What a file holds for one layer.

    Attributes:
        name: the layer's name in the file.
        entries: the tensors, by role.
        scale: PEFT's scale, from its config; None: `alpha` in `entries` decides.
        options: what else PEFT's config says.
        network: whose layer it is, where the name alone does not tell; a preference.
    """

    name: str
    entries: dict[str, TensorEntry]
    scale: float | None = None
    options: LayerOptions = NO_OPTIONS
    network: str = ""


@dataclass
class AdapterFile:
    """What an adapter's files hold.

    Attributes:
        layers: the changes.
        ordered: layers without names, by their order: their network, "" if the file does not say, and the pairs.
        embeddings: textual inversions that come along: tensors by key, by the embedding's name.
        notes: what of the files is passed over.
    """

    layers: list[AdapterLayer] = field(default_factory=list)
    ordered: list[tuple[str, list[Pair]]] = field(default_factory=list)
    embeddings: dict[str, dict[str, TensorEntry]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_adapter(path: Path, allow_pickle: bool = False) -> AdapterFile:
    """An adapter file, or a folder that PEFT or diffusers saved.

    Raises:
        FastsdError: no such file, malformed, a pickle that is not allowed, or not an adapter that fastsd reads.
    """
    result = AdapterFile()
    for part in adapter_parts(path):
        _read_part(part, allow_pickle, result)
    return result


def _read_part(part: AdapterPart, allow_pickle: bool, result: AdapterFile) -> None:
    path = part.weights
    configs: Configs = {} if part.config is None else {"": read_json(part.config)}
    entries, metadata = read_tensors(path, allow_pickle, lists=True)
    if METADATA in metadata:
        configs |= configs_in(path, metadata[METADATA])
    for config in configs.values():
        result.notes += check_config(part.config or path, config)
    entries = _take_ordered(path, entries, metadata, result)
    bundled = {key: entry for key, entry in entries.items() if key.startswith(BUNDLED)}
    for key, entry in bundled.items():
        name, _, rest = key.removeprefix(BUNDLED).partition(".")
        result.embeddings.setdefault(name, {})[rest.removeprefix("string_to_param.")] = entry
    grouped = _group(path, {key: entry for key, entry in entries.items() if key not in bundled}, bool(configs))
    if not grouped and not bundled and not result.ordered:
        raise FastsdError(f"not an adapter ({KINDS}); it holds no tensors", path=path)
    for name, roles in grouped.items():
        result.layers.append(_layer(path, part, name, roles, configs))


def _take_ordered(
    path: Path, entries: dict[str, TensorEntry], metadata: Mapping[str, str], result: AdapterFile
) -> dict[str, TensorEntry]:
    """The tensors without those of cloneofsimo's lora, which go to `result`."""
    if entries and list(entries) == [str(i) for i in range(len(entries))]:
        values = list(entries.values())
        if len(values) % 2:
            raise FastsdError("a list of an odd number of tensors; a LoRA has two a layer", path=path)
        result.ordered.append(("", [{"up": up, "down": down} for up, down in zip(values[::2], values[1::2])]))
        return {}
    rest, found = {}, dict[str, dict[int, Pair]]()
    for key, entry in entries.items():
        if match := _ORDERED.fullmatch(key):
            found.setdefault(match[1], {}).setdefault(int(match[2]), {})[match[3]] = entry
        elif metadata.get(key) == _EMBEDDING_MARK:
            result.embeddings[key] = {key: entry}
        else:
            rest[key] = entry
    for network, pairs in found.items():
        if sorted(pairs) != list(range(len(pairs))) or any(len(pair) != 2 for pair in pairs.values()):
            raise FastsdError(f"the layers {network}:0, {network}:1, ... are not complete", path=path)
        result.ordered.append((network, [pairs[i] for i in range(len(pairs))]))
    return rest


def _group(path: Path, entries: Mapping[str, TensorEntry], peft: bool) -> dict[str, dict[str, TensorEntry]]:
    """The tensors by layer and role.

    Raises:
        FastsdError: a key without a role, or two of one role.
    """
    scaled = {key.removesuffix(".on_input") for key in entries if key.endswith(".on_input")}  # LyCORIS's (IA)^3
    layers: dict[str, dict[str, TensorEntry]] = {}
    unknown = []
    for key, entry in entries.items():
        name, role = split_key(key, peft)
        if key.removesuffix(".weight") in scaled:
            name, role = key.removesuffix(".weight"), "scaling"
        if role is None:
            unknown.append(key)
        elif role in layers.setdefault(name, {}):
            raise FastsdError(f"the key {key} gives {name} a second {role!r}", path=path)
        else:
            layers[name][role] = entry
    if unknown:
        raise FastsdError(_not_an_adapter(unknown, list(entries), bool(layers)), path=path)
    return layers


def _not_an_adapter(unknown: list[str], keys: list[str], partly: bool) -> str:
    kind = unsupported(keys)
    if kind is not None:
        return f"{kind}, which fastsd does not read; its key {unknown[0][:120]!r} shows it"
    if partly:
        return f"the key {unknown[0][:120]!r} has no known role in an adapter"
    return f"not an adapter ({KINDS}); its first key is {unknown[0][:80]!r}"


def _layer(path: Path, part: AdapterPart, name: str, roles: dict[str, TensorEntry], configs: Configs) -> AdapterLayer:
    layer = AdapterLayer(name, roles)
    if part.network:
        layer = replace(layer, name=f"{part.network}.{name.removeprefix('base_model.model.')}")
    config = configs.get(name.split(".", 1)[0], configs.get(""))
    if config is None:
        return layer
    own = _PEFT_PREFIX.sub("", name)
    mapping = config.get("auto_mapping")
    if isinstance(mapping, dict) and "WithProjection" in str(mapping.get("base_model_class")):
        layer = replace(layer, network="text_encoder_2")
    if config and "alpha" not in roles and not {"replacement", "factors", "oft_vectors"} & roles.keys():
        layer = replace(layer, scale=scale_of(own, _rank(roles), config, path))
    return replace(layer, options=options_of(own, config, path))


def _rank(roles: Mapping[str, TensorEntry]) -> int | None:
    """The rank that the tensors have, or None if they do not tell."""
    for role in ("down", "w1_b", "kron_w1_b", "kron_w2_b", "embedding_down"):
        if role in roles and roles[role].shape:
            return roles[role].shape[0] or None
    return None


def layer_roles(layer: AdapterLayer) -> dict[str, list[str]]:
    """The roles that change the layer's weight, and those that change its bias."""
    bias = [role for role in layer.entries if role.startswith("bias_")]
    kinds: dict[str, list[str]] = {"weight": [role for role in layer.entries if role not in bias], "bias": bias}
    if "factors" in layer.entries and not layer.options.feedforward:
        kinds["bias"] = ["factors"]
    return {kind: roles for kind, roles in kinds.items() if roles}
