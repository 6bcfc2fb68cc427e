"""What metadata says of the model that drew a picture."""

from __future__ import annotations

import argparse
import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastsd.pipeline import Pipeline
    from fastsd.weights.hub import Place

BLOCK, BLOCKS = 4096, 16


def settings(pipe: Pipeline, args: argparse.Namespace) -> dict[str, Any]:
    """The settings that say which model it is: of the hub's, the id and the commit; of others, where and what it is."""
    source = pipe.source
    assert source is not None  # the command line has every model from a place
    if args.model in (None, "digits"):
        return {"model_path": "digits", "model_fingerprint": fingerprint(source.path)}
    return _of_place(source, args.model, "model_")


def _of_place(place: Place, given: str, prefix: str) -> dict[str, Any]:
    """Where something is, and what tells it from others: its commit, or samples of its files."""
    if place.hub is not None:
        inside = f"/{place.hub.inside}" if place.hub.inside else ""
        return {f"{prefix}path": f"{place.hub.repo}{inside}", "revision": place.hub.revision}
    return {f"{prefix}path": without_home(given), f"{prefix}fingerprint": fingerprint(place.path)}


def without_home(path: str) -> str:
    """How metadata names a place: as it was given, but without the user's name."""
    home = os.path.expanduser("~")
    return "~" + path[len(home) :] if home != "/" and path.startswith(home + os.sep) else path


def fingerprint(root: Path) -> str:
    """What tells models apart without reading gigabytes.

    Returns:
        The first 16 hexadecimal digits of the SHA-256 of names, sizes, JSON files and samples of the weights.
    """
    digest = hashlib.sha256()
    files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.suffix in (".safetensors", ".json"))
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(root).as_posix()}\0{size}\0".encode("utf-8", "surrogateescape"))
        with file.open("rb") as opened:
            if file.suffix == ".json":
                digest.update(opened.read())
                continue
            for i in range(BLOCKS):
                opened.seek(max(0, (size - BLOCK) * i // (BLOCKS - 1)))
                digest.update(opened.read(BLOCK))
    return digest.hexdigest()[:16]
