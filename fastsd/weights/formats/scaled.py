"""Weights in 8 bits with a scale beside them, as ComfyUI stores them: W = scale * W8. Other quantisations are named."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import torch

from fastsd.errors import FastsdError
from fastsd.weights.formats.json_file import parse_json
from fastsd.weights.formats.safetensors_file import TensorEntry

# ComfyUI's keys (comfy/ops.py): `X.scale_weight`, and later `X.weight_scale` with `X.comfy_quant`, beside `X.weight`.
_SCALE = re.compile(r"(.*\.)(scale_weight|weight_scale)")
# Scales of activations, which matter only where products are computed in 8 bits; and the marker of such a file.
_PASSED_OVER = re.compile(r"(.*\.)?(scaled_fp8|scale_input|input_scale)")
_DESCRIPTION = ".comfy_quant"
_FORMATS = ("float8_e4m3fn", "float8_e5m2")
_OTHERS = {
    r"\.quant_state\.|\.absmax$|\.quant_map$": "bitsandbytes",
    r"\._(data|scale)$|\.weight_qtype$": "quanto",
    r"\.qweight$|\.qzeros$": "GPTQ or AWQ",
    r"\.SCB$|\.weight_format$": "LLM.int8",
    r"\.weight_scale_2$": "NVFP4",
}


def with_scales(path: Path, entries: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The tensors with the scales of those that have one, and without the keys that state them.

    Raises:
        FastsdError: a quantisation that fastsd lacks, by its name; a scale that is no number.
    """
    for key in entries:
        for pattern, name in _OTHERS.items():
            if re.search(pattern, key):
                raise FastsdError(
                    f"weights quantised by {name} (the key {key[:100]!r}), which fastsd does not read; use fp16",
                    path=path,
                )
    result = {key: entry for key, entry in entries.items() if not _PASSED_OVER.fullmatch(key)}
    for key in list(result):
        if key.endswith(_DESCRIPTION):
            _check_description(path, key, result.pop(key))
    for key in list(result):
        match = _SCALE.fullmatch(key)
        target = f"{match[1]}weight" if match else None
        if match is None or target not in result:
            continue
        entry = result.pop(key)
        if math.prod(entry.shape) != 1 or not entry.dtype.is_floating_point:
            raise FastsdError(f"the key {key[:120]!r} is {list(entry.shape)}; it should be one number", path=path)
        scale = float(entry.read())
        if not math.isfinite(scale):
            raise FastsdError(f"the key {key[:120]!r} holds {scale}", path=path)
        assert target is not None
        result[target] = replace(result[target], scale=scale)
    return result


def _check_description(path: Path, key: str, entry: TensorEntry) -> None:
    """Refuse a format of ComfyUI's that is no 8-bit float."""
    text = bytes(entry.read().flatten().tolist()) if entry.nbytes <= 4096 and entry.dtype == torch.uint8 else b""
    try:
        kind = parse_json(text).get("format")
    except (ValueError, AttributeError, RecursionError):
        kind = None
    if kind not in _FORMATS:
        raise FastsdError(
            f"weights in ComfyUI's format {str(kind)[:40]!r} (the key {key[:100]!r}); fastsd reads "
            f"{' and '.join(_FORMATS)}",
            path=path,
        )
