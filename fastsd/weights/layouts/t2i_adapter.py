"""T2I-Adapters from a diffusers folder or a single file, in diffusers' layout or TencentARC's.

What an adapter is, its keys and shapes say, and the model that it is for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from fastsd.config import T2IAdapterConfig, UNetConfig
from fastsd.errors import FastsdError
from fastsd.model.t2i_adapter import T2IAdapter, adapter_downscale
from fastsd.runtime import memory
from fastsd.weights.formats.safetensors_file import TensorEntry
from fastsd.weights.layouts.names import folder_keys
from fastsd.weights.load import fill

PREFIX = "adapter."
_KEY = re.compile(r"body\.(\d{1,3})\.(in_conv|out_conv|block1|body\.0|resnets\.0)\.")
MAX_BLOCKS = 64  # of all levels


def is_t2i_adapter(entries: Mapping[str, TensorEntry]) -> bool:
    """Whether a file's tensors are those of a T2I-Adapter."""
    return any(_KEY.match(key.removeprefix(PREFIX)) for key in entries)


def load_t2i_adapter(
    entries: Mapping[str, TensorEntry], path: Path, model: UNetConfig, dtype: torch.dtype, device: torch.device
) -> T2IAdapter:
    """Load an adapter for a UNet.

    Args:
        entries: its tensors.
        path: where they are from, for messages.
        model: the config of the UNet that it will steer.
        dtype, device: of all weights.

    Raises:
        FastsdError: malformed, or for another family of models.
    """
    entries = {key.removeprefix(PREFIX): entry for key, entry in entries.items()}
    config = _config(path, entries, model)
    memory.check_weights(path, sum(math.prod(entry.shape) for entry in entries.values()), dtype, device)
    with torch.device("meta"):
        module = T2IAdapter(config)
    if not any(".resnets." in key for key in entries):
        entries = _renamed(module, entries)
    return fill(module, entries, path, dtype, device)


def _config(path: Path, entries: Mapping[str, TensorEntry], model: UNetConfig) -> T2IAdapterConfig:
    light = "conv_in.weight" not in entries
    first = "body.0.in_conv.weight" if light else "conv_in.weight"
    shape = entries[first].shape if first in entries else ()
    pixels = shape[1] if len(shape) in (2, 4) else 0
    found = [(c, math.isqrt(pixels // c)) for c in (1, 3) if pixels and c * math.isqrt(pixels // c) ** 2 == pixels]
    if not found:
        raise FastsdError(f"not a T2I-Adapter: its {first} reads no blocks of pixels of 1 or 3 channels", path=path)
    channels, downscale = found[0]
    xl = not model.down_depths(0)
    widths = model.block_out_channels
    widths = (*widths, widths[-1]) if xl else widths
    if downscale != adapter_downscale(model, 8) or (light and xl):
        other = "SDXL's family" if downscale == 16 else "the family of SD 1 and 2"
        raise FastsdError(
            f"this T2I-Adapter shrinks its image to 1/{downscale}; it belongs to {other}, the model does not", path=path
        )
    numbers = {int(match[1]) for key in entries if (match := _KEY.match(key))}
    blocks = max(numbers) + 1
    if any(".resnets." in key for key in entries) or light:
        inner = re.compile(r"body\.0\.(resnets|body)\.(\d{1,3})\.")
        blocks = 1 + max((int(match[2]) for key in entries if (match := inner.match(key))), default=0)
    else:
        blocks //= len(widths)  # TencentARC's full adapters number the blocks of all levels in one row
    if not 0 < blocks <= MAX_BLOCKS:
        raise FastsdError(f"not a T2I-Adapter for this model, which has {len(widths)} levels", path=path)
    halves = tuple(level == 2 if xl else level > 0 for level in range(len(widths)))
    return T2IAdapterConfig(channels, widths, blocks, downscale, light, halves)


def _renamed(module: T2IAdapter, entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """TencentARC's tensors by diffusers' keys; others keep their key, for `fill` to refuse."""
    names = {_original_key(module.config, key): key for key in folder_keys(module)}
    return {names.get(key, key): entry for key, entry in entries.items()}


def _original_key(config: T2IAdapterConfig, key: str) -> str:
    """TencentARC's key for diffusers' `key`."""
    parts = key.split(".")
    if parts[0] != "body":
        return key
    if config.light:
        return key.replace(".resnets.", ".body.")
    level, block = int(parts[1]), int(parts[3]) if parts[2] == "resnets" else 0
    rest = parts[4:] if parts[2] == "resnets" else parts[2:]
    return ".".join(["body", str(level * config.blocks + block), *rest])
