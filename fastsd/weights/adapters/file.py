"""Adapter files (LoRA and its variants): which tensors change which layer, whichever program wrote the file.

A key in a file is a layer's name followed by a tensor's role. Roles are the suffixes below. Names are looked up in a
table of every spelling that programs use, built from the model's own keys; underscores are never split.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsd.errors import FastsdError
from fastsd.files import check_path
from fastsd.weights.formats.json_file import read_json
from fastsd.weights.formats.safetensors_file import TensorEntry, read_header

# The role of a tensor in its layer, by suffix: of kohya and A1111; PEFT; diffusers before PEFT; LyCORIS.
ROLES = {
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_mid.weight": "mid",
    "alpha": "alpha",
    "dora_scale": "magnitude",
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_magnitude_vector": "magnitude_of_outputs",
    "lora_magnitude_vector.weight": "magnitude_of_outputs",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "lora_linear_layer.down.weight": "down",
    "lora_linear_layer.up.weight": "up",
    **{f"hada_{part}": part for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{part}": f"kron_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    "diff": "difference",
    "diff_b": "bias_difference",
    "w_norm": "difference",
    "b_norm": "bias_difference",
}
# Attention processors of diffusers before 0.20: `...attn1.processor.to_q_lora.down.weight`, and in text encoders
# `...to_q_lora.down.weight`.
PROCESSOR = re.compile(r"^(.*?)(?:\.processor)?\.to_(q|k|v|out)_lora\.(down|up)\.weight$")
METADATA = "lora_adapter_metadata"  # the metadata key under which diffusers stores PEFT's configs, as JSON


@dataclass(frozen=True)
class AdapterLayer:
    """What a file holds for one layer.

    Attributes:
        name: the layer's name in the file.
        entries: the tensors, by role.
        scale: PEFT's scale, from its config; None: `alpha` in `entries` decides.
    """

    name: str
    entries: dict[str, TensorEntry]
    scale: float | None = None


def read_adapter(path: Path) -> list[AdapterLayer]:
    """The layers of an adapter file, or of a folder that PEFT saved.

    Raises:
        FastsdError: no such file, malformed, or not an adapter.
    """
    configs: dict[str, dict[str, Any]] = {}
    check_path(path)
    if path.is_dir():
        config = path / "adapter_config.json"
        if not config.is_file():
            raise FastsdError(
                "no adapter_config.json in this folder; give a .safetensors file or PEFT's folder", path=path
            )
        configs[""] = read_json(config)
        path = path / "adapter_model.safetensors"
    if not path.is_file():
        raise FastsdError("no such adapter; give a .safetensors file", path=path)
    entries, metadata = read_header(path)
    if METADATA in metadata:
        configs |= _configs(path, metadata[METADATA])
    layers: dict[str, dict[str, TensorEntry]] = {}
    unknown = []
    for key, entry in entries.items():
        name, role = split_key(key)
        if role is None:
            unknown.append(key)
        elif role in layers.setdefault(name, {}):
            raise FastsdError(f"the key {key} gives {name} a second {role!r}", path=path)
        else:
            layers[name][role] = entry
    if not layers:
        first = f"; its first key is {unknown[0][:80]!r}" if unknown else ""
        raise FastsdError(f"not an adapter (LoRA, LoHa, LoKr, DoRA or a difference){first}", path=path)
    if unknown:
        raise FastsdError(f"the key {unknown[0][:120]!r} has no known role in an adapter", path=path)
    return [AdapterLayer(name, roles, _peft_scale(name, roles, configs)) for name, roles in layers.items()]


def split_key(key: str) -> tuple[str, str | None]:
    """The layer's name and the tensor's role in a key; the role is None if no suffix is known."""
    processor = PROCESSOR.match(key)
    if processor:
        parent, projection, role = processor.groups()
        text = parent.endswith("self_attn")
        out = "out_proj" if text else "to_out.0"
        layer = out if projection == "out" else (f"{projection}_proj" if text else f"to_{projection}")
        return f"{parent}.{layer}", role
    key = key.replace(".default.weight", ".weight")  # PEFT's name for an adapter that has none
    parts = key.split(".")
    for count in (3, 2, 1):
        role = ROLES.get(".".join(parts[-count:]))
        if role is not None and len(parts) > count:
            return ".".join(parts[:-count]), role
    return key, None


def layer_names(network: str, module: str, original: str | None = None) -> Iterator[str]:
    """Every name that programs give a layer.

    Args:
        network: "unet", "text_encoder" or "text_encoder_2".
        module: the layer's name in a diffusers folder.
        original: its name in the original layout, for the UNet.
    """
    yield f"{network}.{module}"
    if network == "unet":
        yield f"lora_unet_{module.replace('.', '_')}"
        yield f"lycoris_{module.replace('.', '_')}"
        yield module
        yield f"base_model.model.{module}"
        if original is not None:
            yield f"lora_unet_{original.replace('.', '_')}"
            yield f"diffusion_model.{original}"
        return
    for prefix in {"text_encoder": ("lora_te_", "lora_te1_"), "text_encoder_2": ("lora_te2_",)}[network]:
        yield prefix + module.replace(".", "_")
    yield f"{network}.{module.removeprefix('text_model.')}"  # transformers 5 has no level text_model


def _configs(path: Path, text: str) -> dict[str, dict[str, Any]]:
    """PEFT's config of each network, from keys like "unet.lora_alpha"."""
    try:
        flat = json.loads(text)
        pairs = [(*key.split(".", 1), value) for key, value in flat.items() if "." in key]
    except (ValueError, AttributeError, RecursionError) as error:
        raise FastsdError(f"its metadata {METADATA} is not a JSON object", path=path) from error
    configs: dict[str, dict[str, Any]] = {}
    for network, key, value in pairs:
        configs.setdefault(network, {})[key] = value
    return configs


def _peft_scale(name: str, roles: Mapping[str, TensorEntry], configs: dict[str, dict[str, Any]]) -> float | None:
    """alpha / rank, or alpha / sqrt(rank) for rank-stabilised LoRA (Kalajdzievski 2023); None without a config."""
    if "down" not in roles or "alpha" in roles:
        return None
    config = configs.get(name.split(".", 1)[0], configs.get("", None))
    if config is None:
        return None
    alpha = config.get("lora_alpha")
    patterns = config.get("alpha_pattern")
    if isinstance(patterns, dict):
        # PEFT's rule: a pattern matches the end of the layer's name.
        alpha = next((a for p, a in patterns.items() if re.search(rf"(^|\.){re.escape(p)}$", name)), alpha)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        return None
    rank = roles["down"].shape[0]
    return alpha / rank**0.5 if config.get("use_rslora") is True else alpha / rank
