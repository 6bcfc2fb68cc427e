"""--embedding and --embedding-dir: textual inversions that the prompt names."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsd.errors import FastsdError, about
from fastsd.files import fingerprint

if TYPE_CHECKING:
    from fastsd.pipeline import Pipeline

SUFFIXES = (".safetensors", ".pt", ".bin")  # where two files of a folder have one name, the first of these counts


def load(pipe: Pipeline, args: argparse.Namespace, before: dict[str, Any], notes: list[str]) -> list[dict[str, str]]:
    """Load the textual inversions that the flags give.

    Args:
        before: the settings of the repeated image, or nothing.
        notes: what the user should know is added.

    Returns:
        What metadata says of those that the prompts name: {"name": file, "sha256": ..., "token": name in the prompt}.

    Raises:
        FastsdError: a file that cannot be read, or one that the repeated image was generated with and that is not
            given.
    """
    from fastsd.text.chunks import find_names
    from fastsd.weights.hub.locate import locate_file

    text = f"{args.prompt}\n{args.negative_prompt or ''}"

    def named(names: tuple[str, ...]) -> str | None:
        return next((name for _, name in find_names(text, names) if name is not None), None)

    chosen = [(*split(given), "embedding", given) for given in args.embedding or ()]
    if args.embedding_dir is not None:
        files = {file.stem: file for file in reversed(in_folder(Path(args.embedding_dir)))}
        chosen += [
            (file, None, "embedding_dir", str(file))
            for stem, file in sorted(files.items())
            if named((stem,)) is not None
        ]
    used = []
    for path, token, argument, given in chosen:
        with about(argument, given):
            path = locate_file(str(path)).path
            name = named(pipe.load_embedding(path, token, allow_pickle=bool(args.allow_pickle)))
        if name is None:
            notes.append(f"the prompt does not name the embedding {path.name!r}")
        else:
            used.append({"name": path.name, "sha256": fingerprint(path.read_bytes()), "token": name})
    with about("from_image", args.from_image):
        _compare(before, used, text, notes)
    return used


def split(given: str) -> tuple[Path, str | None]:
    """`FILE` or `FILE:token`; a colon in the name of an existing file belongs to the name."""
    path, colon, token = given.rpartition(":")
    if not colon or os.path.isfile(given) or not Path(path).suffix:
        return Path(given), None
    return Path(path), token


def in_folder(folder: Path) -> list[Path]:
    """The embeddings in a folder, the preferred endings first.

    Raises:
        FastsdError: no such folder.
    """
    if not os.path.isdir(folder):
        raise FastsdError("no such folder", argument="embedding_dir", path=folder)
    files = [file for file in sorted(folder.iterdir()) if file.suffix.lower() in SUFFIXES]
    return sorted(files, key=lambda file: SUFFIXES.index(file.suffix.lower()))


def _compare(before: dict[str, Any], used: list[dict[str, str]], text: str, notes: list[str]) -> None:
    """Check that a repeated image gets the embeddings that it was generated with."""
    from fastsd.image.infotext import is_another
    from fastsd.text.chunks import find_names

    for token, digits in (before.get("embedding_hashes") or {}).items():
        files = [embedding for embedding in used if embedding["token"].lower() == token.lower()]
        if any(is_another(digits, embedding["sha256"]) for embedding in files):
            notes.append(f"the embedding {token[:80]!r} is another file than that image's, {digits[:12]}")
        elif not files and any(name is not None for _, name in find_names(text, [token])):
            notes.append(f"not repeated: the embedding {token[:80]!r}; give it with --embedding or --embedding-dir")
    for old in before.get("embeddings") or ():
        if not isinstance(old, dict) or not all(isinstance(old.get(key), str) for key in ("name", "sha256", "token")):
            continue
        if any(embedding["sha256"] == old["sha256"] for embedding in used):
            continue
        if any(embedding["token"].lower() == old["token"].lower() for embedding in used):
            notes.append(f"the embedding {old['token'][:80]!r} is another file than {old['name'][:80]!r} of that image")
        elif any(name is not None for _, name in find_names(text, [old["token"]])):
            raise FastsdError(
                f"it was generated with {{embedding}} {old['name'][:80]!r} (sha256 {old['sha256'][:12]}...); "
                "give that file again"
            )
