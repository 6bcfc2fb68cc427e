"""CLIP's vision towers in transformers' names: a folder, also of a whole CLIP, or one file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from fastsd.config import CLIP_VIT_BIGG, CLIP_VIT_H, CLIP_VIT_L, VisionConfig
from fastsd.errors import FastsdError
from fastsd.model.vision import VisionEncoder
from fastsd.runtime import memory
from fastsd.weights.formats.json_file import ConfigReader, read_json
from fastsd.weights.formats.safetensors_file import TensorEntry
from fastsd.weights.layouts.single_file import read_file
from fastsd.weights.load import error_path, fill, find_files, read_headers

TOWERS = {config.hidden_size: config for config in (CLIP_VIT_L, CLIP_VIT_H, CLIP_VIT_BIGG)}
PREFIXES = ("vision_model.", "visual_projection.")
# transformers' defaults, which the configs that it writes may leave out: ViT-B/32's.
DEFAULTS: dict[str, int] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "patch_size": 32,
    "image_size": 224,
    "projection_dim": 512,
}


def read_vision_config(path: Path, data: dict[str, Any] | None = None) -> VisionConfig:
    """A vision tower's config, transformers' or the part of a whole CLIP's that is about images.

    data: what the file would hold, for a config that is in memory.
    """
    data = read_json(path) if data is None else data
    if isinstance(data.get("vision_config"), dict):
        data = data["vision_config"] | {"projection_dim": data.get("projection_dim")}
    r = ConfigReader(path, data)
    r.one_of("model_type", ("clip_vision_model",), "clip_vision_model")
    config = VisionConfig(
        **{name: r.get(name, int, value) for name, value in DEFAULTS.items()},
        hidden_act=r.one_of("hidden_act", ("quick_gelu", "gelu"), "quick_gelu"),
        layer_norm_eps=r.get("layer_norm_eps", float, 1e-5),
    )
    r.one_of("num_channels", (3,), 3)
    for name, part, whole in (
        ("num_attention_heads", config.num_attention_heads, config.hidden_size),
        ("patch_size", config.patch_size, config.image_size),
    ):
        if not part or whole % part:
            raise r.error(name, f"it should divide {whole}")
    return config


def load_vision(path: Path, dtype: torch.dtype, device: torch.device, allow_pickle: bool = False) -> VisionEncoder:
    """Load CLIP's vision tower: a folder with `config.json`, or one file in transformers' names, whose width tells it.

    Raises:
        FastsdError: not such a tower, or malformed.
    """
    if path.is_dir():
        config = read_vision_config(path / "config.json")
        files = find_files(path, "model", dtype != torch.float32)
        entries, where = read_headers(files), error_path(files)
    else:
        entries, where = read_file(path, allow_pickle)[0], path
        config = _tower_of(path, entries)
    entries = {
        key: entry for key, entry in entries.items() if key.startswith(PREFIXES) and not key.endswith("position_ids")
    }
    memory.check_weights(path, sum(math.prod(entry.shape) for entry in entries.values()), dtype, device)
    with torch.device("meta"):
        module = VisionEncoder(config)
    return fill(module, entries, where, dtype, device)


def _tower_of(path: Path, entries: dict[str, TensorEntry]) -> VisionConfig:
    table = entries.get("vision_model.embeddings.class_embedding")
    if table is None:
        open_clip = any(key.startswith("visual.") for key in entries)
        hint = (
            "it has open_clip's names; take the one in transformers' names"
            if open_clip
            else ("the key vision_model.embeddings.class_embedding is missing")
        )
        raise FastsdError(f"not CLIP's vision tower: {hint}", argument="ip_encoder", path=path)
    if table.shape[-1] not in TOWERS:
        raise FastsdError(
            f"a vision tower of {table.shape[-1]} channels; without a config.json, {sorted(TOWERS)} are known",
            argument="ip_encoder",
            path=path,
        )
    return TOWERS[table.shape[-1]]
