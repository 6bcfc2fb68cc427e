"""An image's settings as text inside it: A1111's form, which other programs read, and an unambiguous copy.

A1111's form, the PNG text chunk `parameters` (`fastsd.image.infotext`), cannot always be read back, since a prompt may
itself look like it. The second chunk, `fastsd`, is JSON and is preferred where it is there. Settings carry the names of
`fastsd.parameters`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from fastsd.errors import FastsdError
from fastsd.image.comfy_graph import read_graph
from fastsd.image.infotext import is_settings, parse_parameters, write_parameters
from fastsd.image.programs import program_of
from fastsd.parameters import PARAMETERS

MAX_TEXT = 2**18  # characters of A1111's text; a prompt has at most 100,000
# What metadata holds besides parameters. `embeddings` is a list of {"name", "sha256", "token"}, `loras` a list of
# {"name", "sha256", "strength", "hash"}. Of the parameters, `image` and `mask` are {"name", "sha256"}; `vae` and
# `refiner` {"name", "path"} with "fingerprint" (or "revision", for the hub) and "hash"; `controls` a list of such with
# "image", "map", "weight", "start", "end"; `image_prompts` with "images", "mask", "scale".
RECORDS: dict[str, type] = {
    "model": str,
    "model_path": str,
    "model_fingerprint": str,
    "model_hash": str,
    "version": str,
    "embeddings": list,
    "loras": list,
}


def stored_types() -> dict[str, Any]:
    """What the JSON copy may hold: keys, and the types of their values."""
    stored = {row.key: row.kind.stored for row in PARAMETERS.values() if row.kind.stored is not None}
    return RECORDS | stored


def write_texts(settings: Mapping[str, Any]) -> dict[str, str]:
    """The two text chunks of an image."""
    known = stored_types()
    kept = {key: value for key, value in settings.items() if key in known and value is not None}
    return {"parameters": write_parameters(settings), "fastsd": json.dumps(kept)}


def read_texts(texts: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The settings in an image's text chunks.

    Returns:
        The settings that were found, with `unread` from a ComfyUI graph (`read_graph`); and the pairs of A1111's form
        that fastsd does not act on.

    Raises:
        FastsdError: there are none.
    """
    own = parse_json(texts.get("fastsd", ""))
    if "prompt" in own:
        return own, {}
    parameters = texts.get("parameters", "")
    if len(parameters) > MAX_TEXT:
        raise FastsdError(f"its text of settings has {len(parameters)} characters; at most {MAX_TEXT} are read")
    if is_settings(parameters):
        return parse_parameters(parameters)
    graph = read_graph(texts.get("prompt", ""))
    if graph is not None:
        return graph
    program = program_of(texts)
    if program == "ComfyUI" and "prompt" in texts:
        raise FastsdError("ComfyUI's graph in it (`prompt`) is damaged; give {prompt} and the others")
    if program == "ComfyUI":
        raise FastsdError(
            "it holds only ComfyUI's workflow; the graph (`prompt`) is missing; give {prompt} and the others"
        )
    if program is not None:
        raise FastsdError(f"its settings are {program}'s, which fastsd does not read; give {{prompt}} and the others")
    raise FastsdError("no settings are stored in this image (a PNG text `parameters` or `fastsd`)")


def parse_json(text: str) -> dict[str, Any]:
    """The JSON copy; values of the wrong type are left out."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    known = stored_types()
    if not isinstance(found, dict):
        return {}
    return {key: value for key, value in found.items() if key in known and _fits(known[key], value)}


def _fits(kind: Any, value: Any) -> bool:
    """Whether a value is of its type. JSON's true is not a number here, nor is NaN."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        return False
    return not isinstance(value, float) or math.isfinite(value)
