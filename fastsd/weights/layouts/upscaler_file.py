"""The files of ESRGAN-style upscalers: `.pth` or `.safetensors`, in each layout that has been in use.

A file may hold its table of tensors under a name, as `params_ema`; the keys may start with `module.`, which parallel
training leaves. The networks' sizes are read from the shapes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from fastsd.errors import FastsdError
from fastsd.model.upscalers import (
    CONVOLUTIONS,
    CompactConfig,
    RRDBConfig,
    UpscalerConfig,
    UpscalerNetwork,
    make_network,
)
from fastsd.runtime import memory
from fastsd.weights.formats.safetensors_file import TensorEntry
from fastsd.weights.layouts.names import sources
from fastsd.weights.layouts.single_file import read_file
from fastsd.weights.layouts.upscaler_names import OLD_BLOCK, has_key, other_kind, upscaler_kind
from fastsd.weights.load import fill, pop_entry, refuse_unused
from fastsd.weights.recognise import recognise

Entries = dict[str, TensorEntry]

PREFIXES = ("params_ema.", "params.", "module.", "netG.", "net.")  # of averaged weights, where a file holds both
MAX_FEATURES, MAX_LAYERS, MAX_DOUBLINGS, MAX_SCALE = 1024, 200, 4, 16


def load_upscaler(
    path: str | Path, dtype: torch.dtype, device: str | torch.device = "cpu", allow_pickle: bool = False
) -> UpscalerNetwork:
    """Load an upscaler's network.

    Args:
        path: its file.
        dtype, device: of the weights.
        allow_pickle: read `.pth` files; only tensors and plain values are unpickled.

    Raises:
        FastsdError: not an upscaler, or one of a kind that fastsd does not have; malformed, a key missing or extra; too
            large for the memory.
    """
    path, device = Path(path), torch.device(device)
    module, entries = _checked(path, read_entries(path, allow_pickle))
    memory.check_weights(path, sum(math.prod(entry.shape) for entry in entries.values()), dtype, device)
    return fill(module, entries, path, dtype, device)


def upscaler_entries(path: Path, allow_pickle: bool = False) -> Entries | None:
    """An upscaler's tensors by the names of Real-ESRGAN's files; None of a file that is none.

    Raises:
        FastsdError: as `load_upscaler`, where it is one.
    """
    entries = read_entries(path, allow_pickle)
    return None if upscaler_kind(entries) is None else _checked(path, entries)[1]


def _checked(path: Path, entries: Entries) -> tuple[UpscalerNetwork, Entries]:
    """A file's network on the meta device and its tensors by the network's names; all are there, in their shapes."""
    config, entries = _outline(path, entries)
    with torch.device("meta"):
        module = make_network(config)
    unchecked = dict(entries)
    for _, _, parts in sources(module):
        for source in parts:
            pop_entry(unchecked, source, path)
    refuse_unused(unchecked)
    return module, entries


def read_entries(path: Path, allow_pickle: bool) -> Entries:
    """The tensors of an upscaler's file, out of what wraps them.

    Raises:
        FastsdError: no file, malformed, or a pickle that is not allowed.
    """
    if not path.exists():
        raise FastsdError("no such file; an upscaler is a .safetensors or .pth file", path=path)
    entries = read_file(path, allow_pickle)[0]
    for prefix in PREFIXES:
        inside = {key.removeprefix(prefix): entry for key, entry in entries.items() if key.startswith(prefix)}
        if inside and (prefix.startswith("params") or len(inside) == len(entries)):
            entries = inside
    return entries


def _outline(path: Path, entries: Entries) -> tuple[UpscalerConfig, Entries]:
    """The network of a file, and its tensors by the network's names."""
    kind = upscaler_kind(entries)
    if kind is None:
        raise FastsdError(_what_else(path, entries), path=path)
    table = dict(entries) if kind == "compact" else _renamed(entries)
    shapes = {key: entry.shape for key, entry in table.items()}
    for key, shape in shapes.items():
        if len(shape) not in (1, 4) or not all(0 < side <= MAX_FEATURES * MAX_SCALE for side in shape):
            raise FastsdError(
                f"the key {table[key].key[:120]} is {list(shape)}; no upscaler has such a layer", path=path
            )
    try:
        config = _compact_config(shapes) if kind == "compact" else _rrdb_config(shapes)
    except KeyError as error:
        raise FastsdError(
            f"its {kind} network is not complete: the key {error.args[0]} is missing", path=path
        ) from None
    except ValueError as error:
        raise FastsdError(f"an upscaler ({kind}) that fastsd does not have: {error}", path=path) from None
    return config, table


def _what_else(path: Path, entries: Entries) -> str:
    """What a file is that holds no network of ours."""
    other = other_kind(entries)
    if other is not None:
        return f"a network of another kind, {other}; fastsd reads ESRGAN's (RRDB) and Real-ESRGAN's compact one"
    if any(key.startswith("model.diffusion_model.") for key in entries):
        return "not an upscaler but a checkpoint of Stable Diffusion; use it with {model}"
    facts = dict(recognise(path, entries, allow_pickle=True))  # it has been read, so it may be
    if "kind" in facts:
        return f"not an upscaler but {facts['kind']}"
    if not entries:
        return "not an upscaler: it holds no tensors"
    return f"not an upscaler that fastsd knows: its keys are like {min(entries)[:80]!r}"


def _renamed(entries: Entries) -> Entries:
    """An RRDB network's tensors by Real-ESRGAN's names; what has no such name keeps its key, for `fill` to refuse.

    The oldest files have the numbers of a sequence, in which doublings and activations count too.
    """
    if has_key(entries, OLD_BLOCK):
        numbers = [int(found[1]) for key in entries if (found := re.match(r"model\.(\d{1,3})\.weight$", key))]
        last = max(numbers, default=4)
        inside = [int(found[1]) for key in entries if (found := re.match(r"model\.1\.sub\.(\d{1,3})\.weight$", key))]
        names = {"model.0": "conv_first", f"model.{last - 2}": "conv_hr", f"model.{last}": "conv_last"}
        names |= {f"model.1.sub.{max(inside, default=0)}": "conv_body"}
        names |= {f"model.{3 * i}": f"conv_up{i}" for i in range(1, (last - 4) // 3 + 1)}
        pattern = r"model\.1\.sub\.(\d{1,3})\.RDB(\d)\.conv(\d(?:x1)?)(?:\.0)?"
    else:
        names = {"trunk_conv": "conv_body", "HRconv": "conv_hr"}
        names |= {f"upconv{i}": f"conv_up{i}" for i in range(1, MAX_DOUBLINGS + 1)}
        pattern = r"(?:RRDB_trunk|body)\.(\d{1,3})\.(?:RDB|rdb)(\d)\.conv(\d(?:x1)?)"
    renamed = {}
    for key, entry in entries.items():
        layer, _, kind = key.rpartition(".")
        inner = re.fullmatch(pattern, layer)
        name = inner.expand(r"body.\1.rdb\2.conv\3") if inner else names.get(layer, layer)
        renamed[f"{name}.{kind}"] = entry
    return renamed


def _rrdb_config(shapes: Mapping[str, tuple[int, ...]]) -> RRDBConfig:
    """Raises KeyError for a layer that is missing, ValueError for a network that fastsd does not have."""
    features, inputs = shapes["conv_first.weight"][:2]
    channels = shapes["conv_last.weight"][0]
    unshuffle = math.isqrt(inputs // channels)
    blocks = 1 + max(int(key.split(".")[1]) for key in shapes if key.startswith("body."))
    doublings = sum(key.startswith("conv_up") and key.endswith(".weight") for key in shapes)
    config = RRDBConfig(
        channels=_known_channels(channels),
        features=features,
        growth=shapes["body.0.rdb1.conv1.weight"][0],
        blocks=blocks,
        doublings=doublings,
        unshuffle=unshuffle,
        plus=any(".conv1x1." in key for key in shapes),
    )
    if inputs != channels * unshuffle**2 or unshuffle not in (1, 2, 4) or 2**doublings < unshuffle:
        raise ValueError(f"it reads {inputs} channels and gives {channels}")
    _check_counts(features, config.growth * CONVOLUTIONS, blocks=blocks, doublings=doublings)
    return config


def _compact_config(shapes: Mapping[str, tuple[int, ...]]) -> CompactConfig:
    """Raises as `_rrdb_config`."""
    features, channels = shapes["body.0.weight"][:2]
    last = max(int(key.split(".")[1]) for key in shapes if re.match(r"body\.\d{1,4}\.weight$", key))
    rows = shapes[f"body.{last}.weight"][0]
    scale = math.isqrt(rows // channels)
    if len(shapes["body.1.weight"]) != 1:
        raise ValueError("its second layer is no PReLU")
    if last % 2 or rows != channels * scale**2:
        raise ValueError(f"its last layer, body.{last}, gives {rows} channels for {channels}")
    _check_counts(features, blocks=last // 2, scale=scale)
    return CompactConfig(_known_channels(channels), features, last // 2 - 1, scale)


def _known_channels(channels: int) -> int:
    if channels not in (1, 3):
        raise ValueError(f"its images have {channels} channels; fastsd has those for 3, or for 1")
    return channels


def _check_counts(*widths: int, blocks: int, doublings: int = 0, scale: int = 1) -> None:
    if max(widths) > MAX_FEATURES or blocks > MAX_LAYERS or doublings > MAX_DOUBLINGS or scale > MAX_SCALE:
        raise ValueError(f"{max(widths)} channels in {blocks} blocks, {doublings} doublings, x{scale}")
