"""Adapter files (LoRA and its relatives): which tensors change which layer, whoever wrote the file.

A file's keys are a layer's name and a tensor's role. Roles are the suffixes below. Names are looked up in a table that
is built from the model's own keys, in every spelling that programs use; underscores are never taken apart.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastsd.errors import FastsdError
from fastsd.weights.formats.json_file import read_json
from fastsd.weights.formats.safetensors_file import Entry, read_header

# What a tensor is to its layer. kohya and A1111; PEFT; diffusers before PEFT; LyCORIS.
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
# Attention processors, diffusers before 0.20: `...attn1.processor.to_q_lora.down.weight`, text `...to_q_lora....`.
PROCESSOR = re.compile(r"^(.*?)(?:\.processor)?\.to_(q|k|v|out)_lora\.(down|up)\.weight$")
METADATA = "lora_adapter_metadata"  # where diffusers keeps PEFT's configs, as JSON


@dataclass(frozen=True)
class Layer:
    """What a file holds for one layer.

    Attributes:
        name: as the file has it. entries: by role. scale: PEFT's, from its config; None where `alpha` decides.
    """

    name: str
    entries: dict[str, Entry]
    scale: float | None = None

    def read(self) -> dict[str, torch.Tensor]:
        """The tensors in fp32."""
        return {role: entry.read().float() for role, entry in self.entries.items()}


def read_adapter(path: Path) -> list[Layer]:
    """The layers of an adapter file, or of the folder that PEFT saves.

    Raises:
        FastsdError: no such file, malformed, or no adapter.
    """
    configs: dict[str, dict[str, Any]] = {}
    if path.is_dir():
        config = path / "adapter_config.json"
        if not config.is_file():
            raise FastsdError(
                f"{path}: no adapter_config.json in this folder; give a .safetensors file or PEFT's folder"
            )
        configs[""] = read_json(config)
        path = path / "adapter_model.safetensors"
    if not path.is_file():
        raise FastsdError(f"{path}: no such adapter; give a .safetensors file")
    entries, metadata = read_header(path)
    if METADATA in metadata:
        configs |= _configs(path, metadata[METADATA])
    found: dict[str, dict[str, Entry]] = {}
    strangers = []
    for key, entry in entries.items():
        name, role = split(key)
        if role is None:
            strangers.append(key)
        elif role in found.setdefault(name, {}):
            raise FastsdError(f"{path}: the key {key} gives {name} a second {role!r}")
        else:
            found[name][role] = entry
    if not found:
        what = f"; its first key is {strangers[0][:80]!r}" if strangers else ""
        raise FastsdError(f"{path}: not an adapter (LoRA, LoHa, LoKr, DoRA or a difference){what}")
    if strangers:
        raise FastsdError(f"{path}: the key {strangers[0][:120]!r} has no known role in an adapter")
    return [Layer(name, parts, _peft_scale(name, parts, configs)) for name, parts in found.items()]


def split(key: str) -> tuple[str, str | None]:
    """A key as the layer's name and the tensor's role; None where it has none."""
    processor = PROCESSOR.match(key)
    if processor:
        parent, which, role = processor.groups()
        text = parent.endswith("self_attn")
        out = "out_proj" if text else "to_out.0"
        layer = out if which == "out" else (f"{which}_proj" if text else f"to_{which}")
        return f"{parent}.{layer}", role
    key = key.replace(".default.weight", ".weight")  # PEFT's own name for an adapter without one
    parts = key.split(".")
    for count in (3, 2, 1):
        role = ROLES.get(".".join(parts[-count:]))
        if role is not None and len(parts) > count:
            return ".".join(parts[:-count]), role
    return key, None


def names(component: str, module: str, ldm: str | None = None) -> Iterator[str]:
    """Every name that programs give a layer.

    Args:
        component: "unet", "text_encoder" or "text_encoder_2".
        module: the layer's name in a diffusers folder.
        ldm: its name in the original layout, for the UNet.
    """
    yield f"{component}.{module}"
    if component == "unet":
        yield f"lora_unet_{module.replace('.', '_')}"
        yield f"lycoris_{module.replace('.', '_')}"
        yield module
        yield f"base_model.model.{module}"
        if ldm is not None:
            yield f"lora_unet_{ldm.replace('.', '_')}"
            yield f"diffusion_model.{ldm}"
        return
    for prefix in {"text_encoder": ("lora_te_", "lora_te1_"), "text_encoder_2": ("lora_te2_",)}[component]:
        yield prefix + module.replace(".", "_")
    yield f"{component}.{module.removeprefix('text_model.')}"  # transformers 5 has no such level


def _configs(path: Path, text: str) -> dict[str, dict[str, Any]]:
    """PEFT's config of each component, from keys like "unet.lora_alpha"."""
    try:
        flat = json.loads(text)
        pairs = [(*key.split(".", 1), value) for key, value in flat.items() if "." in key]
    except (ValueError, AttributeError, RecursionError) as error:
        raise FastsdError(f"{path}: its metadata {METADATA} are not a JSON object") from error
    configs: dict[str, dict[str, Any]] = {}
    for component, key, value in pairs:
        configs.setdefault(component, {})[key] = value
    return configs


def _peft_scale(name: str, parts: Mapping[str, Entry], configs: dict[str, dict[str, Any]]) -> float | None:
    """alpha / rank, or alpha / sqrt(rank) (rank-stabilised LoRA, Kalajdzievski 2023), where a config says so."""
    if "down" not in parts or "alpha" in parts:
        return None
    config = configs.get(name.split(".", 1)[0], configs.get("", None))
    if config is None:
        return None
    alpha = config.get("lora_alpha")
    patterns = config.get("alpha_pattern")
    if isinstance(patterns, dict):
        # PEFT's rule: the pattern is the end of the layer's name.
        alpha = next((a for p, a in patterns.items() if re.search(rf"(^|\.){re.escape(p)}$", name)), alpha)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        return None
    rank = parts["down"].shape[0]
    return alpha / rank**0.5 if config.get("use_rslora") is True else alpha / rank
