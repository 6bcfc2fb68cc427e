"""Lists of training images in files: folders. Nothing is decoded here."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from fastsd.errors import FastsdError
from fastsd.image.files import read_file

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
MAX_CAPTION_BYTES = 2**16
METADATA = "metadata.jsonl"


@dataclass(frozen=True)
class Sample:
    """An image of the data set: its name in messages, its captions, and a function that reads its file's bytes."""

    name: str
    captions: tuple[str, ...]
    read: Callable[[], bytes]


def list_folder(folder: Path, caption: str = "") -> list[Sample]:
    """The images of a folder: those that its metadata.jsonl names, or else all in it and below, each with a text file
    of the same name, one caption a line. Images without one have `caption`.

    Raises:
        FastsdError: no such folder, no images, no captions, a metadata.jsonl that is none.
    """
    if not folder.is_dir():
        raise FastsdError("no such folder; data.path should be a folder of images with captions", path=folder)
    if (folder / METADATA).is_file():
        samples = _listed(folder)
    else:
        files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_ENDINGS and p.is_file())
        samples = [Sample(p.relative_to(folder).as_posix(), _beside(p), _reader(p)) for p in files]
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


def _listed(folder: Path) -> list[Sample]:
    """What metadata.jsonl lists: {"file_name", "text"}, where the text is a caption or a list of them."""
    path = folder / METADATA
    samples = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name, text = entry["file_name"], entry.get("text", entry.get("caption", []))
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
            raise FastsdError(f'line {number} should be {{"file_name": ..., "text": ...}}', path=path) from None
        captions = [text] if isinstance(text, str) else text
        if not isinstance(name, str) or not isinstance(captions, list) or not all(isinstance(c, str) for c in captions):
            raise FastsdError(f'line {number}: "file_name" is a string, "text" a string or a list of them', path=path)
        file = folder / name
        if not file.resolve().is_relative_to(folder.resolve()):
            raise FastsdError(f"line {number}: {name!r:.80} is outside of the folder", path=path)
        samples.append(Sample(name, tuple(c for c in captions if c.strip()), _reader(file)))
    return samples


def _beside(image: Path) -> tuple[str, ...]:
    """The captions in the text file beside an image, one a line."""
    path = image.with_suffix(".txt")
    if not path.is_file() or path.stat().st_size > MAX_CAPTION_BYTES:
        return ()
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return tuple(line.strip() for line in lines if line.strip())


def _reader(path: Path) -> Callable[[], bytes]:
    return lambda: read_file(path)
