"""A picture's settings as text inside it: what A1111 writes and others read, and our own unambiguous copy.

A1111's form, the PNG text chunk `parameters` (`fastsd.image.infotext`), cannot always be read back, since a prompt may
itself hold such lines. The second chunk, `fastsd`, is JSON and is preferred where it is there. Settings carry the names
of `Pipeline.__call__`'s arguments.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from fastsd.errors import FastsdError
from fastsd.image.infotext import parse_parameters, write_parameters

# What the JSON copy may hold. `image` and `mask` are {"name": ..., "sha256": ...} of the files that were given,
# `embeddings` a list of such with "token", the name in the prompt; `loras` one with "strength" and "hash"; `vae` and
# `refiner` are {"name": ..., "path": ...} with "fingerprint" or, of the hub's, "revision"; and "hash"; `controls` a
# list of such with "image", "edges", "weight", "start", "end".
FIELDS: dict[str, type | tuple[type, ...]] = {
    "prompt": str,
    "negative_prompt": str,
    "num_inference_steps": int,
    "guidance_scale": (int, float),
    "guidance_rescale": (int, float),
    "width": int,
    "height": int,
    "seed": int,
    "sampler": str,
    "schedule": str,
    "eta": (int, float),
    "clip_skip": int,
    "strength": (int, float),
    "vae_tiling": bool,
    "model": str,
    "model_path": str,
    "model_fingerprint": str,
    "model_hash": str,
    "revision": str,
    "prediction": str,
    "ema": bool,
    "vae": dict,
    "device": str,
    "dtype": str,
    "batch_size": int,
    "version": str,
    "image": dict,
    "mask": dict,
    "prompt_syntax": str,
    "embeddings": list,
    "loras": list,
    "few_step": str,
    "hires_scale": (int, float),
    "hires_strength": (int, float),
    "hires_steps": int,
    "hires_upscaler": str,
    "refiner": dict,
    "refiner_switch": (int, float),
    "controls": list,
}


def write_texts(settings: Mapping[str, Any]) -> dict[str, str]:
    """The two text chunks of a picture."""
    kept = {key: value for key, value in settings.items() if key in FIELDS and value is not None}
    return {"parameters": write_parameters(settings), "fastsd": json.dumps(kept)}


def read_texts(texts: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The settings in a picture's text chunks.

    Returns:
        The settings, those that were found; and what else A1111's form says, which fastsd does not act on.

    Raises:
        FastsdError: there are none.
    """
    own = parse_json(texts.get("fastsd", ""))
    if "prompt" in own:
        return own, {}
    settings, others = parse_parameters(texts.get("parameters", ""))
    if not settings.get("prompt") and len(settings) < 3:
        raise FastsdError("no settings are stored in this picture (a PNG text `parameters` or `fastsd`)")
    return settings, others


def parse_json(text: str) -> dict[str, Any]:
    """Our own chunk; whatever is not of the right type is left out."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return {key: value for key, value in found.items() if _fits(key, value)} if isinstance(found, dict) else {}


def _fits(key: str, value: Any) -> bool:
    """Whether `value` is what `FIELDS` says of `key`."""
    kind = FIELDS.get(key)
    if kind is None or not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        return False
    return not isinstance(value, float) or math.isfinite(value)
