"""--lora and --lora-dir: adapters by their files, or by <lora:name:strength> in the prompt."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsd.cli import flags
from fastsd.errors import FastsdError
from fastsd.files import fingerprint
from fastsd.text.syntax import take_loras

if TYPE_CHECKING:
    from fastsd.pipeline import Pipeline
    from fastsd.weights.adapters.apply import Adapter

SUFFIX = ".safetensors"
LIMIT = 100.0


def load(pipe: Pipeline, args: argparse.Namespace, before: dict[str, Any], notes: list[str]) -> list[dict[str, Any]]:
    """Put the adapters that the flags and the prompt name into the model.

    Args:
        before: the settings of the picture that is repeated, or nothing.
        notes: what the user should know is added.

    Returns:
        What metadata says of them: {"name": file, "sha256": ..., "strength": ..., "hash": as A1111 shows it}, and
        "text_strength" where that is another.

    Raises:
        FastsdError: a file that is missing, malformed or for another model; or one that the repeated picture was drawn
            with and that is not given.
    """
    from fastsd.weights.adapters.apply import Adapter
    from fastsd.weights.hub import locate as hub

    try:
        files = [(hub.locate_file(str(path)).path, strength) for path, strength in map(split, args.lora or ())]
    except FastsdError as error:
        raise FastsdError(f"--lora {error}") from error
    try:
        tags = () if args.prompt_syntax == "plain" else take_loras(args.prompt)[1]
    except FastsdError as error:
        raise FastsdError(flags.in_flags(str(error))) from error
    chosen = [Adapter(path, strength, strength) for path, strength in files]
    chosen += [Adapter(in_folder(args.lora_dir, tag.name), tag.unet, tag.text) for tag in tags]
    try:
        notes += pipe.set_adapters(chosen, bool(args.allow_partial))
    except FastsdError as error:
        raise FastsdError(f"--lora {error}") from error
    used = [_described(adapter) for adapter in chosen]
    for old in before.get("loras") or ():
        if isinstance(old, dict) and not any(one["sha256"] == old.get("sha256") for one in used):
            raise FastsdError(
                f"--from-image {args.from_image}: it was drawn with --lora {str(old.get('name'))[:80]!r} "
                f"(sha256 {str(old.get('sha256'))[:12]}...); give that file again"
            )
    return used


def split(given: str) -> tuple[Path, float]:
    """`FILE` or `FILE:strength`; a colon in the name of a file that is there belongs to the name.

    Raises:
        FastsdError: the strength is no number from -100 to 100.
    """
    path, colon, text = given.rpartition(":")
    if not colon or Path(given).exists():
        return Path(given), 1.0
    try:
        strength = float(text)
    except ValueError:
        strength = math.nan
    if not abs(strength) <= LIMIT:
        raise FastsdError(f"--lora {given}: {text[:40]!r} should be a strength from -{LIMIT:g} to {LIMIT:g}")
    return Path(path), strength


def in_folder(folder: str | None, name: str) -> Path:
    """The file that <lora:name> means.

    Raises:
        FastsdError: no folder was given, or it does not hold that file.
    """
    if folder is None:
        raise FastsdError(f"--prompt: <lora:{name}> needs --lora-dir, the folder that holds {name}{SUFFIX}")
    if not Path(folder).is_dir():
        raise FastsdError(f"--lora-dir {folder}: no such folder")
    files = {file.stem: file for file in sorted(Path(folder).rglob(f"*{SUFFIX}"))}
    if name not in files:
        import difflib

        near = difflib.get_close_matches(name, files, n=1, cutoff=0.6)
        hint = f"; did you mean {near[0]}?" if near else f", but {', '.join(sorted(files)[:5]) or 'no such files'}"
        raise FastsdError(f"--lora-dir {folder}: no {name}{SUFFIX} in it{hint}")
    return files[name]


def _described(adapter: Adapter) -> dict[str, Any]:
    from fastsd.weights.hashes import adapter_hash

    data = content(adapter.path)
    said = {"name": adapter.path.name, "sha256": fingerprint(data), "strength": adapter.unet}
    return (
        said | {"hash": adapter_hash(data)} | ({"text_strength": adapter.text} if adapter.text != adapter.unet else {})
    )


def content(path: Path) -> bytes:
    """The bytes that tell an adapter from others: its file's, or those of PEFT's folder."""
    return (path / "adapter_model.safetensors" if path.is_dir() else path).read_bytes()
