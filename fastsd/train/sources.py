"""Images with captions in a folder, for training and for evaluation. Nothing is decoded here."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastsd.errors import FastsdError
from fastsd.files import reason
from fastsd.image.files import read_file

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
MAX_CAPTION_BYTES = 2**16
MAX_METADATA_BYTES = 2**28
METADATA = "metadata.jsonl"


@dataclass(frozen=True)
class Sample:
    """An image of the data set: its name in messages, its captions, and a function that reads its file's bytes."""

    name: str
    captions: tuple[str, ...]
    read: Callable[[], bytes]


@dataclass(frozen=True)
class Entry:
    """An image of a folder.

    Attributes:
        name: its path from the folder on. file: its path; whether it is there was not looked at.
        captions: from the metadata, or the text file beside it; none is possible.
        row: what metadata.jsonl says of it. where: how a message names it, "line 3" there, or its name.
    """

    name: str
    file: Path
    captions: tuple[str, ...]
    row: Mapping[str, Any]
    where: str


def entries(folder: Path) -> list[Entry]:
    """The images of a folder: those that its metadata.jsonl names, or else all in it and below, each with a text file
    of the same name, one caption a line.

    Raises:
        FastsdError: no such folder, a metadata.jsonl that is none, a text file that is too large for captions.
    """
    if not folder.is_dir():
        raise FastsdError("no such folder", path=folder)
    if (folder / METADATA).is_file():
        return _listed(folder)
    files = sorted(
        p
        for p in folder.rglob("*")
        if p.suffix.lower() in IMAGE_ENDINGS and not p.name.startswith(".") and p.is_file()  # ._a.png is macOS's own
    )
    names = [(p.relative_to(folder).as_posix(), p) for p in files]
    return [Entry(name, path, _beside(path), {}, name) for name, path in names]


def list_folder(folder: Path, caption: str = "") -> list[Sample]:
    """The images of a folder (`entries`) as training samples. Images without a caption have `caption`.

    Raises:
        FastsdError: as `entries` does; or no images, no captions.
    """
    if not folder.is_dir():
        raise FastsdError("no such folder; data.path should be a folder of images with captions", path=folder)
    samples = [Sample(entry.name, entry.captions, _reader(entry.file)) for entry in entries(folder)]
    if not samples:
        raise FastsdError(f"no images; a folder of {', '.join(IMAGE_ENDINGS[:4])} files is needed", path=folder)
    if caption:
        samples = [sample if sample.captions else replace(sample, captions=(caption,)) for sample in samples]
    if not any(sample.captions for sample in samples):
        raise FastsdError(
            f'{len(samples)} images but no captions; "name.txt" beside "name.png" holds them, or {METADATA} with'
            ' {"file_name": ..., "text": ...} in each line; or data.caption is one for all',
            path=folder,
        )
    return samples


def _listed(folder: Path) -> list[Entry]:
    """What metadata.jsonl lists: {"file_name", "text"}, where the text is a caption or a list of them."""
    path, found = folder / METADATA, []
    try:
        if path.stat().st_size > MAX_METADATA_BYTES:
            raise FastsdError(f"{METADATA} has more than {MAX_METADATA_BYTES // 2**20} MiB", path=path)
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # JSON may hold other ends of lines, such as U+2028
    except (OSError, UnicodeDecodeError) as error:
        why = reason(error) if isinstance(error, OSError) else "is not UTF-8"
        raise FastsdError(why, path=path) from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"line {number}"
        try:
            row = json.loads(line)
            name, text = row["file_name"], row.get("text", row.get("caption", []))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise FastsdError(f'{where} should be {{"file_name": ..., "text": ...}}', path=path) from None
        captions = [text] if isinstance(text, str) else text
        if not isinstance(name, str) or not isinstance(captions, list) or not all(isinstance(c, str) for c in captions):
            raise FastsdError(f'{where}: "file_name" is a string, "text" a string or a list of them', path=path)
        file = folder / name
        if not file.resolve().is_relative_to(folder.resolve()):
            raise FastsdError(f"{where}: {name!r:.80} is outside of the folder", path=path)
        found.append(Entry(name, file, tuple(c for c in captions if c.strip()), row, where))
    return found


def _beside(image: Path) -> tuple[str, ...]:
    """The captions in the text file beside an image, one a line."""
    path = image.with_suffix(".txt")
    if not path.is_file():
        return ()
    if path.stat().st_size > MAX_CAPTION_BYTES:
        raise FastsdError(f"has more than {MAX_CAPTION_BYTES} bytes", path=path)
    return caption_lines(path.read_bytes(), path)


def caption_lines(data: bytes, path: Path, name: str = "") -> tuple[str, ...]:
    """The captions in a text file's bytes, one a line: UTF-8, or UTF-16 with its mark.

    Args:
        path, name: the file, and its name within that one, for errors.
    """
    utf_16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if utf_16 else "utf-8-sig")
    except UnicodeDecodeError:
        raise FastsdError(f"{name and name + ': '}captions should be UTF-8; save it as that", path=path) from None
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def _reader(path: Path) -> Callable[[], bytes]:
    return lambda: read_file(path)
