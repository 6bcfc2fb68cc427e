"""ControlNets from a diffusers folder or a single file, in diffusers' or the original layout.

A ControlNet is a copy of its model's contracting path, so its config is the model's; a file made for another family has
other shapes, and is refused by the first of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from fastsd.config import ControlNetConfig, UNetConfig
from fastsd.errors import FastsdError
from fastsd.model.controlnet import ControlNet
from fastsd.runtime import memory
from fastsd.weights.formats.json_file import Reader
from fastsd.weights.formats.safetensors_file import Entry
from fastsd.weights.layouts.ldm_names import unet_place, unet_table
from fastsd.weights.layouts.single_file import keys, read_file
from fastsd.weights.load import fill, find_files, place_of, read_headers

PREFIX = "control_model."
HINT = "controlnet_cond_embedding."
ORIGINAL_HINT = "input_hint_block."
MAX_HINTS = 16  # layers that shrink the picture

# What keys that hold such a part belong to, where a file is no ControlNet that is read.
_OTHERS = {
    "lora_controlnet": "a Control-LoRA, which is not read",
    "task_embedding": "a ControlNet for several tasks (union), which is not read",
    "control_add_embedding": "a ControlNet for several tasks (union), which is not read",
    "adapter.body.": "a T2I adapter, which is not read",
    "body.0.resnets": "a T2I adapter, which is not read",
    "ip_adapter": "an IP-Adapter, which is not read",
    "model.diffusion_model.": "a whole checkpoint, which --model takes",
    "lora": "a LoRA, which --lora takes",
    "encoder.conv_in": "an autoencoder, which --vae takes",
}


def load_controlnet(
    path: str | Path,
    model: UNetConfig,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    allow_pickle: bool = False,
) -> ControlNet:
    """Load a ControlNet for a UNet.

    Args:
        path: a diffusers folder, or a single file in either layout.
        model: of the UNet that it will steer.
        dtype, device: of all weights.
        allow_pickle: read pickles; nothing but tensors and plain values is unpickled.

    Raises:
        FastsdError: no ControlNet, malformed, or one for another family of models.
    """
    path, device = Path(path), torch.device(device)
    bgr = False
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FastsdError(f"{path}: no config.json in this folder, so it is no ControlNet in the diffusers layout")
        bgr = _read_config(path / "config.json", model)
        files = find_files(path, "diffusion_pytorch_model", dtype != torch.float32)
        entries, where = read_headers(files), place_of(files)
    else:
        (entries, _), where = read_file(path, allow_pickle), path
    entries = {key.removeprefix(PREFIX): entry for key, entry in entries.items()}
    original = f"{ORIGINAL_HINT}0.weight" in entries
    if not original and f"{HINT}conv_in.weight" not in entries:
        raise FastsdError(f"{path}: {_what_else(entries)}")
    memory.check_weights(path, sum(math.prod(entry.shape) for entry in entries.values()), dtype, device)
    with torch.device("meta"):
        module = ControlNet(_config(where, model, entries, original, bgr))
    if original:
        entries = _renamed(where, module, entries)
    _check_family(path, module, entries)
    return fill(module, entries, where, dtype, device)


def _read_config(path: Path, model: UNetConfig) -> bool:
    """What a folder says that its keys and shapes do not: whether pictures are read blue first."""
    r = Reader(path)
    if r.data.get("_class_name") not in ("ControlNetModel", None):
        raise r.error("_class_name", "it should be ControlNetModel")
    r.one_of("global_pool_conditions", (False,), False)
    r.one_of("conditioning_channels", (3,), 3)
    r.one_of("class_embed_type", (None,), None)
    r.one_of("encoder_hid_dim", (None,), None)
    width = r.get("cross_attention_dim", int, model.cross_attention_dim)
    if width != model.cross_attention_dim:
        raise r.error("cross_attention_dim", f"the model's text has {model.cross_attention_dim} features")
    return r.one_of("controlnet_conditioning_channel_order", ("rgb", "bgr"), "rgb") == "bgr"


def _config(path: Path, model: UNetConfig, entries: Mapping[str, Entry], original: bool, bgr: bool) -> ControlNetConfig:
    """The model's contracting path, with the hint's widths and the depth of each level as the keys tell."""
    name = f"{ORIGINAL_HINT}{{}}.weight" if original else f"{HINT}blocks.{{}}.weight"
    first = entries[f"{ORIGINAL_HINT}0.weight" if original else f"{HINT}conv_in.weight"]
    layers = [name.format(2 * i + 2 if original else i) for i in range(MAX_HINTS)]
    found = [entries[layer] for layer in layers if layer in entries]
    shapes = [entry.shape for entry in (first, *(found[:-1] if original else found))]  # the original's last is conv_out
    if any(len(shape) != 4 or not 0 < shape[0] <= 4096 for shape in shapes):
        raise FastsdError(f"{path}: the key {first.key} and those after it are no layers that shrink a picture")
    depths, middle = model.transformer_layers_per_block, model.mid_transformer_layers
    if not original:  # small ones have no attention
        held = [any(key.startswith(f"down_blocks.{i}.attentions.") for key in entries) for i in range(len(depths))]
        depths = tuple(depth if here else 0 for depth, here in zip(depths, held, strict=True))
        middle = middle if any(key.startswith("mid_block.attentions.") for key in entries) else 0
    unet = replace(
        model,
        in_channels=model.out_channels,
        transformer_layers_per_block=depths,
        mid_transformer_layers=middle,
        time_cond_proj_dim=0,  # no ControlNet is told the guidance scale
    )
    return ControlNetConfig(unet, (shapes[0][0], *(shape[0] for shape in shapes[2::2])), bgr)


def _renamed(path: Path, module: ControlNet, entries: dict[str, Entry]) -> dict[str, Entry]:
    """The original layout's tensors by the house's keys; what belongs to none keeps its name, for `fill` to refuse."""
    table = unet_table(module.config)
    places = {key: _place(module, table, key) for key in keys(module)}
    for place in places.values():
        if place not in entries:
            raise FastsdError(f"{path}: the key {place} is missing")
    known = set(places.values())
    return {key: entries[place] for key, place in places.items()} | {
        key: entry for key, entry in entries.items() if key not in known
    }


def _place(module: ControlNet, table: dict[str, str], key: str) -> str:
    """Where a key of the house stands in the original layout."""
    if key.startswith(HINT):
        layer, kind = key.removeprefix(HINT).rsplit(".", 1)
        blocks = len(module.controlnet_cond_embedding.blocks)
        ends = {"conv_in": 0, "conv_out": 2 * (blocks + 1)}
        place = ends[layer] if layer in ends else 2 * (int(layer.removeprefix("blocks.")) + 1)
        return f"{ORIGINAL_HINT}{place}.{kind}"
    if key.startswith("controlnet_down_blocks."):
        number, kind = key.removeprefix("controlnet_down_blocks.").split(".")
        return f"zero_convs.{number}.0.{kind}"
    if key.startswith("controlnet_mid_block."):
        return key.replace("controlnet_mid_block.", "middle_block_out.0.")
    return unet_place(table, key).key


def _check_family(path: Path, module: ControlNet, entries: Mapping[str, Entry]) -> None:
    """Say of a file for another family that it is one, rather than that some key is missing."""
    wanted = module.config.cross_attention_dim
    texts = [entry for key, entry in entries.items() if key.endswith("attn2.to_k.weight") and len(entry.shape) == 2]
    if texts and texts[0].shape[1] != wanted:
        raise FastsdError(
            f"{path}: this ControlNet reads {texts[0].shape[1]} features of text and the model's text has {wanted}; it "
            "belongs to another family of models (SD 1: 768, SD 2: 1024, SDXL: 2048)"
        )


def _what_else(entries: Mapping[str, Entry]) -> str:
    for part, name in _OTHERS.items():
        if any(part in key for key in entries):
            return f"not a ControlNet: it looks like {name}"
    first = f"; its first key is {min(entries)[:80]!r}" if entries else ": it holds no tensors"
    return f"not a ControlNet: the key {HINT}conv_in.weight is missing{first}"
