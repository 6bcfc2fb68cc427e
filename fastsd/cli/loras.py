"""--lora and --lora-dir: adapters by their files, or by <lora:name:strength> in the prompt."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsd.errors import FastsdError, about
from fastsd.files import fingerprint
from fastsd.generate.lora_flags import STRENGTH, adapters_of
from fastsd.parameters import nearest
from fastsd.text.syntax import composed, take_loras

if TYPE_CHECKING:
    from fastsd.pipeline import Pipeline
    from fastsd.weights.adapters.apply import Adapter

SUFFIX = ".safetensors"
SUFFIXES = (SUFFIX, ".pt", ".bin", ".ckpt")  # of adapters in a folder; all but the first are pickles


def load(pipe: Pipeline, args: argparse.Namespace, before: dict[str, Any], notes: list[str]) -> list[dict[str, Any]]:
    """Put the adapters that the flags and the prompt name into the model.

    Args:
        before: the settings of the repeated image, or nothing.
        notes: what the user should know is added.

    Returns:
        What metadata says of them: {"name": file, "sha256": ..., "strength": ..., "hash": as A1111 shows it}, and
        "text_strength" where that is another.

    Raises:
        FastsdError: a file that is missing, malformed or for another model; or one that the repeated image was
            generated with and that is not given.
    """
    from fastsd.weights.adapters.apply import Adapter

    if args.lora_dir is not None and not os.path.isdir(args.lora_dir):
        raise FastsdError("no such folder", argument="lora_dir", path=args.lora_dir)
    chosen = adapters_of(args.lora or ())
    tags = () if args.prompt_syntax == "plain" else take_loras(args.prompt)[1]
    chosen += [Adapter(find_in_folder(args.lora_dir, tag.name, notes), tag.unet, tag.text) for tag in tags]
    with about("lora"):
        used = [_describe(adapter) for adapter in chosen]
    given = {lora["sha256"] for lora in used}
    stored = [old for old in before.get("loras") or () if isinstance(old, dict) and old.get("sha256") not in given]
    with about("from_image", args.from_image):
        again = [_find_again(args.lora_dir, old) for old in stored]
    with about("lora"):
        notes += pipe.set_adapters([*again, *chosen], bool(args.allow_partial), bool(args.allow_pickle))
    notes += _others(before.get("lora_hashes") or {}, used)
    return [_describe(adapter) for adapter in again] + used


def _find_again(folder: str | None, old: dict[str, Any]) -> Adapter:
    """The adapter that an image's metadata describes, from the folder of them: the file of its name and hash.

    Raises:
        FastsdError: no folder was given, or it does not hold that file; or its strength is none.
    """
    from fastsd.weights.adapters.apply import Adapter
    from fastsd.weights.adapters.locate import adapter_bytes

    name, digits = str(old.get("name")), old.get("sha256")
    for path in () if folder is None else _adapters_in(Path(folder)):
        if composed(path.name) == composed(name) and fingerprint(adapter_bytes(path)) == digits:
            with about(None, path):
                strength = STRENGTH.check(old.get("strength"))
                return Adapter(path, strength, STRENGTH.check(old.get("text_strength", strength)))
    lacking = "" if folder is None else "{lora_dir} does not hold it, "
    raise FastsdError(
        f"it was generated with {{lora}} {name[:80]!r} (sha256 {str(digits)[:12]}...); {lacking}give that file again"
    )


def _others(hashes: dict[str, str], used: list[dict[str, Any]]) -> list[str]:
    """Notes on LoRAs that are other files than A1111's of the same names."""
    from fastsd.image.infotext import is_another

    known = {name.lower(): digits for name, digits in hashes.items()}
    named = [(lora, known.get(Path(lora["name"]).stem.lower(), "")) for lora in used]
    return [
        f"the LoRA {lora['name'][:80]!r} is another file than that image's, {digits[:12]}"
        for lora, digits in named
        if is_another(digits, lora["hash"], lora["sha256"])
    ]


def find_in_folder(folder: str | None, name: str, notes: list[str]) -> Path:
    """The file, or PEFT's folder, that <lora:name> or <lora:folder/name> means.

    Args:
        folder: --lora-dir; names count at any depth in it.
        name: composed or decomposed Unicode, as the file's own may be.
        notes: where several have the name, a line that says which one is used is added.

    Raises:
        FastsdError: no folder was given, or it does not hold that file.
    """
    if folder is None:
        raise FastsdError(f"<lora:{name}> needs {{lora_dir}}, the folder that holds {name}{SUFFIX}", argument="prompt")
    known: dict[str, list[Path]] = {}
    for path in _adapters_in(Path(folder)):
        inside = composed(str(path.relative_to(folder).as_posix()))
        inside = inside if path.is_dir() else inside.removesuffix(path.suffix)
        parts = inside.split("/")
        for start in range(len(parts)):
            known.setdefault("/".join(parts[start:]), []).append(path)
    found = known.get(composed(name).replace("\\", "/"), [])
    if not found:
        short = sorted(key for key in known if "/" not in key)
        hint = nearest(name, short) or f"; there are {', '.join(short[:5]) or 'none'}"
        raise FastsdError(f"<lora:{name}>: no such LoRA in {{lora_dir}}{hint}", argument="prompt")
    if len(found) > 1:
        others = ", ".join(str(path.relative_to(folder)) for path in found[1:4])
        notes.append(
            f"<lora:{name}> is {found[0].relative_to(folder)}; {others} {'has' if len(found) == 2 else 'have'} that "
            "name too: write <lora:folder/name>"
        )
    return found[0]


def _adapters_in(folder: Path) -> list[Path]:
    """The files and PEFT's folders in a folder: nearest to its top first, then those that are no pickles, by name."""
    found = [path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()]
    found += [path.parent for path in folder.rglob("adapter_config.json")]
    return sorted(
        (path for path in found if path != folder),
        key=lambda path: (len(path.parts), bool(path.suffix.lower() in SUFFIXES[1:]), str(path)),
    )


def _describe(adapter: Adapter) -> dict[str, Any]:
    from fastsd.files.hashes import adapter_hash
    from fastsd.weights.adapters.locate import adapter_bytes

    data = adapter_bytes(adapter.path)
    setting = {"name": adapter.path.name, "sha256": fingerprint(data), "strength": adapter.unet}
    setting["hash"] = adapter_hash(data)
    return setting | ({"text_strength": adapter.text} if adapter.text != adapter.unet else {})
