"""IP-Adapter's files.

An adapter is one file, `.safetensors` or `.bin`, of two tables: `image_proj`, which makes tokens of an image's
features, and `ip_adapter`, the keys and values of every cross-attention.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

from fastsd.config import IPAdapterConfig, VisionConfig
from fastsd.errors import FastsdError
from fastsd.model.ip_adapter import RESAMPLER_HEAD, IPAdapter
from fastsd.model.layers import CrossAttention
from fastsd.model.unet import UNet
from fastsd.runtime import memory
from fastsd.weights.formats.safetensors_file import TensorEntry
from fastsd.weights.layouts.single_file import read_file
from fastsd.weights.layouts.vision import TOWERS, load_vision, read_vision_config
from fastsd.weights.load import fill

Entries = dict[str, TensorEntry]

PROJECTION, ATTENTION = "image_proj.", "ip_adapter."
TOWER_FOLDER = "image_encoder"
_FACE_ID = "an IP-Adapter of face ids, which reads a face recognition network's vector; fastsd has no such network"


def load_ip_adapter(
    path: Path,
    encoder: Path | None,
    unet: UNet,
    dtype: torch.dtype,
    device: torch.device,
    allow_pickle: bool = False,
) -> IPAdapter:
    """Load an adapter for a UNet, with its vision tower.

    Args:
        path: the adapter's file.
        encoder: the tower's folder or file; None: `image_encoder` beside the file, or beside its folder's `models`, as
            h94/IP-Adapter has it.
        unet: the UNet that will read it.
        dtype, device: of all weights.
        allow_pickle: read `.bin` files; only tensors and plain values are unpickled.

    Raises:
        FastsdError: not an IP-Adapter, one of face ids or of another family, malformed; no tower, or another one.
    """
    entries = read_file(path, allow_pickle)[0]
    config = _config(path, entries, unet)
    tower = _find_tower(path, config) if encoder is None else encoder
    with torch.device("meta"):
        module = IPAdapter(config, _heads(unet))
    memory.check_weights(path, sum(math.prod(entry.shape) for entry in entries.values()), dtype, device)
    order = {2 * theirs + 1: ours for theirs, ours in enumerate(_file_order(unet))}
    renamed = {_renumbered(key, order): entry for key, entry in entries.items()}
    fill(module, renamed, path, dtype, device)
    module.encoder = load_vision(tower, dtype, device, allow_pickle)
    _check_tower(module.encoder.config, config, tower)
    return module


def _file_order(unet: UNet) -> list[int]:
    """The file numbers cross-attentions in the order down, up, middle; ours run down, middle, up."""
    names = [name for name, module in unet.named_modules() if isinstance(module, CrossAttention)]
    places = {"down_blocks": 0, "up_blocks": 1, "mid_block": 2}
    return sorted(range(len(names)), key=lambda i: (places[names[i].split(".")[0]], i))


def _renumbered(key: str, order: dict[int, int]) -> str:
    """`ip_adapter.1.to_k_ip.weight` by the order of use; another number keeps its key, for `fill` to refuse."""
    parts = key.split(".")
    if parts[0] == "ip_adapter" and len(parts) > 2 and parts[1].isdecimal() and int(parts[1]) in order:
        parts[1] = str(order[int(parts[1])])
        return ".".join(parts)
    return key if parts[0] != "ip_adapter" else f"unknown.{key}"


def _heads(unet: UNet) -> tuple[int, ...]:
    return tuple(module.heads for module in unet.modules() if isinstance(module, CrossAttention))


def _config(path: Path, entries: Entries, unet: UNet) -> IPAdapterConfig:
    """What the file is, by its keys and shapes."""
    shapes = {key.removeprefix(PROJECTION): entry.shape for key, entry in entries.items() if key.startswith(PROJECTION)}
    attention = [key for key in entries if key.startswith(ATTENTION)]
    if not shapes or not attention:
        first = min(entries, default="")
        raise FastsdError(f"not an IP-Adapter: it has no image_proj and ip_adapter, but {first[:80]!r}", path=path)
    if any("lora" in key for key in attention) or any("perceiver_resampler" in key for key in shapes):
        raise FastsdError(_FACE_ID, path=path)
    if "norm.weight" in shapes and "proj.0.weight" in shapes:
        raise FastsdError(_FACE_ID, path=path)
    if any(len(shape) not in (1, 2, 3) or not all(0 < n <= 65536 for n in shape) for shape in shapes.values()):
        raise FastsdError("its image_proj is no IP-Adapter's: a shape is out of range", path=path)
    text = unet.config.cross_attention_dim
    try:
        config = _by_shapes(shapes, text, _widths(unet))
    except (KeyError, IndexError) as error:
        raise FastsdError(f"not an IP-Adapter that fastsd knows: {error} is missing in image_proj", path=path) from None
    found = entries[min(attention)].shape
    if len(found) == 2 and found[1] != text:
        raise FastsdError(
            f"this IP-Adapter makes tokens of {found[1]} features and the model's text has {text}; it belongs to "
            "another family (SD 1: 768, SD 2: 1024, SDXL: 2048)",
            path=path,
        )
    return config


def _by_shapes(shapes: dict[str, tuple[int, ...]], text: int, widths: tuple[int, ...]) -> IPAdapterConfig:
    if "proj.weight" in shapes:
        rows, features = shapes["proj.weight"]
        return IPAdapterConfig("embedding", features, text, widths, tokens=max(rows // text, 1))
    if "proj.3.weight" in shapes:
        return IPAdapterConfig("full", shapes["proj.0.weight"][1], text, widths)
    _, tokens, channels = shapes["latents"]
    layers = len({key.split(".")[1] for key in shapes if key.startswith("layers.")})
    return IPAdapterConfig(
        "resampler",
        shapes["proj_in.weight"][1],
        text,
        widths,
        tokens=tokens,
        resampler_channels=channels,
        resampler_layers=min(layers, 64),
        resampler_heads=max(shapes["layers.0.0.to_q.weight"][0] // RESAMPLER_HEAD, 1),
        resampler_inner=shapes["layers.0.1.1.weight"][0],
    )


def _widths(unet: UNet) -> tuple[int, ...]:
    return tuple(module.to_q.weight.shape[0] for module in unet.modules() if isinstance(module, CrossAttention))


def _find_tower(path: Path, config: IPAdapterConfig) -> Path:
    """`image_encoder` as h94/IP-Adapter has it: beside the file; SDXL's vit-h files read that in `models`."""
    places = [path.parent / TOWER_FOLDER, path.parent.parent / "models" / TOWER_FOLDER]
    for place in places:
        if (place / "config.json").is_file():
            try:
                _check_tower(read_vision_config(place / "config.json"), config, place)
            except FastsdError:
                continue
            return place
    raise FastsdError(
        f"it reads a vision tower of {_wanted(config)}; give its folder or file with {{ip_encoder}} (none that fits "
        f"is in {places[0]})",
        path=path,
    )


def _wanted(config: IPAdapterConfig) -> str:
    for tower in TOWERS.values():
        if config.image_features == (tower.projection_dim if config.kind == "embedding" else tower.hidden_size):
            return f"{config.image_features} features ({tower.name})"
    return f"{config.image_features} features"


def _check_tower(tower: VisionConfig, config: IPAdapterConfig, path: Path) -> None:
    found = tower.projection_dim if config.kind == "embedding" else tower.hidden_size
    if found != config.image_features:
        raise FastsdError(
            f"its features are {found}; the IP-Adapter reads {_wanted(config)}", argument="ip_encoder", path=path
        )
