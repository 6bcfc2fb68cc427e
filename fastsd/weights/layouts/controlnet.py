"""ControlNets from a diffusers folder or a single file, in diffusers' or the original layout; T2I-Adapters beside them.

A ControlNet is a copy of its model's contracting path, so its config is the model's. A file for another family has
other shapes, and the first that differs is refused.
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
from fastsd.model.t2i_adapter import T2IAdapter
from fastsd.runtime import memory
from fastsd.weights.formats.json_file import ConfigReader
from fastsd.weights.formats.safetensors_file import TensorEntry
from fastsd.weights.layouts.ldm_names import unet_key, unet_table
from fastsd.weights.layouts.names import folder_keys
from fastsd.weights.layouts.single_file import read_file
from fastsd.weights.layouts.t2i_adapter import is_t2i_adapter, load_t2i_adapter
from fastsd.weights.load import error_path, fill, find_files, read_headers

PREFIX = "control_model."
HINT = "controlnet_cond_embedding."
ORIGINAL_HINT = "input_hint_block."
MAX_HINTS = 16  # layers that shrink the image

# What a file is if it is not a ControlNet that fastsd reads, by a part of its keys.
_NOT_CONTROLNETS = {
    "lora_controlnet": "a Control-LoRA, which fastsd does not read",
    "task_embedding": "a ControlNet for several tasks (union), which fastsd does not read",
    "control_add_embedding": "a ControlNet for several tasks (union), which fastsd does not read",
    "style_embedding": "a T2I-Adapter for styles, which fastsd does not read",
    "ip_adapter": "an IP-Adapter, which {ip_adapter} takes",
    "model.diffusion_model.": "a whole checkpoint, which {model} takes",
    "lora": "a LoRA, which {lora} takes",
    "encoder.conv_in": "an autoencoder, which {vae} takes",
}


def load_controlnet(
    path: str | Path,
    model: UNetConfig,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    allow_pickle: bool = False,
) -> ControlNet | T2IAdapter:
    """Load a ControlNet or a T2I-Adapter for a UNet; the file says which of them it is.

    Args:
        path: a diffusers folder, or a single file in either layout.
        model: the config of the UNet that it will steer.
        dtype, device: of all weights.
        allow_pickle: read pickles; only tensors and plain values are unpickled.

    Raises:
        FastsdError: neither of them, malformed, or for another family of models.
    """
    path, device = Path(path), torch.device(device)
    bgr = False
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FastsdError(
                "no config.json in this folder, so it is not a ControlNet in the diffusers layout", path=path
            )
        bgr = _read_config(path / "config.json", model)
        files = find_files(path, "diffusion_pytorch_model", dtype != torch.float32)
        entries, where = read_headers(files), error_path(files)
    else:
        (entries, _), where = read_file(path, allow_pickle), path
    if is_t2i_adapter(entries):
        return load_t2i_adapter(entries, where, model, dtype, device)
    entries = {key.removeprefix(PREFIX): entry for key, entry in entries.items()}
    original = f"{ORIGINAL_HINT}0.weight" in entries
    if not original and f"{HINT}conv_in.weight" not in entries:
        raise FastsdError(f"{_what_else(entries)}", path=path)
    memory.check_weights(path, sum(math.prod(entry.shape) for entry in entries.values()), dtype, device)
    with torch.device("meta"):
        module = ControlNet(_config(where, model, entries, original, bgr))
    if original:
        entries = _renamed(where, module, entries)
    _check_family(path, module, entries)
    return fill(module, entries, where, dtype, device)


def _read_config(path: Path, model: UNetConfig) -> bool:
    """Check a folder's config; return what its keys and shapes do not tell: whether images are read as BGR."""
    r = ConfigReader(path)
    if r.data.get("_class_name") == "T2IAdapter":
        return False
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


def _config(
    path: Path, model: UNetConfig, entries: Mapping[str, TensorEntry], original: bool, bgr: bool
) -> ControlNetConfig:
    """The model's contracting path, with the widths of the hint and the depths of the levels that the keys show."""
    name = f"{ORIGINAL_HINT}{{}}.weight" if original else f"{HINT}blocks.{{}}.weight"
    first = entries[f"{ORIGINAL_HINT}0.weight" if original else f"{HINT}conv_in.weight"]
    layers = [name.format(2 * i + 2 if original else i) for i in range(MAX_HINTS)]
    later = [entries[layer] for layer in layers if layer in entries]
    shapes = [entry.shape for entry in (first, *(later[:-1] if original else later))]  # the original's last is conv_out
    if any(len(shape) != 4 or not 0 < shape[0] <= 4096 for shape in shapes):
        raise FastsdError(f"the key {first.key} and those after it are not layers that shrink an image", path=path)
    depths, middle = model.transformer_layers_per_block, model.mid_transformer_layers
    if not original:  # small ones have no attention
        attends = [any(key.startswith(f"down_blocks.{i}.attentions.") for key in entries) for i in range(len(depths))]
        depths = tuple(depth if attention else 0 for depth, attention in zip(depths, attends, strict=True))
        middle = middle if any(key.startswith("mid_block.attentions.") for key in entries) else 0
    last = ("middle_block.2.", "mid_block.resnets.1.")
    resnets = 2 if any(key.startswith(last) for key in entries) else 1
    unet = replace(
        model,
        in_channels=model.out_channels,
        transformer_layers_per_block=depths,
        mid_transformer_layers=middle,
        mid_resnets=resnets,
        time_cond_proj_dim=0,  # no ControlNet reads the guidance scale
    )
    return ControlNetConfig(unet, (shapes[0][0], *(shape[0] for shape in shapes[2::2])), bgr)


def _renamed(path: Path, module: ControlNet, entries: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The original layout's tensors by diffusers' keys; others keep their key, for `fill` to refuse."""
    table = unet_table(module.config)
    originals = {key: _original_key(module, table, key) for key in folder_keys(module)}
    for original in originals.values():
        if original not in entries:
            raise FastsdError(f"the key {original} is missing", path=path)
    known = set(originals.values())
    return {key: entries[original] for key, original in originals.items()} | {
        key: entry for key, entry in entries.items() if key not in known
    }


def _original_key(module: ControlNet, table: dict[str, str], key: str) -> str:
    """The original key for diffusers' `key`."""
    if key.startswith(HINT):
        layer, kind = key.removeprefix(HINT).rsplit(".", 1)
        blocks = len(module.controlnet_cond_embedding.blocks)
        ends = {"conv_in": 0, "conv_out": 2 * (blocks + 1)}
        index = ends[layer] if layer in ends else 2 * (int(layer.removeprefix("blocks.")) + 1)
        return f"{ORIGINAL_HINT}{index}.{kind}"
    if key.startswith("controlnet_down_blocks."):
        number, kind = key.removeprefix("controlnet_down_blocks.").split(".")
        return f"zero_convs.{number}.0.{kind}"
    if key.startswith("controlnet_mid_block."):
        return key.replace("controlnet_mid_block.", "middle_block_out.0.")
    return unet_key(table, key).key


def _check_family(path: Path, module: ControlNet, entries: Mapping[str, TensorEntry]) -> None:
    """Refuse a ControlNet of another family as such; otherwise the message would name some missing key."""
    expected = module.config.cross_attention_dim
    keys = [entry for key, entry in entries.items() if key.endswith("attn2.to_k.weight") and len(entry.shape) == 2]
    if keys and keys[0].shape[1] != expected:
        raise FastsdError(
            f"this ControlNet reads {keys[0].shape[1]} text features and the model's text has {expected}; it "
            "belongs to another family (SD 1: 768, SD 2: 1024, SDXL: 2048)",
            path=path,
        )


def _what_else(entries: Mapping[str, TensorEntry]) -> str:
    for part, name in _NOT_CONTROLNETS.items():
        if any(part in key for key in entries):
            return f"not a ControlNet: it looks like {name}"
    first = f"; its first key is {min(entries)[:80]!r}" if entries else ": it holds no tensors"
    return f"not a ControlNet: the key {HINT}conv_in.weight is missing{first}"
