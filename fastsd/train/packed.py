"""Training images in few large files: IDX arrays, WebDataset shards. Nothing is decoded here."""

from __future__ import annotations

import gzip
import io
import json
import math
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastsd.errors import FastsdError
from fastsd.image.files import MAX_BYTES
from fastsd.train.sources import IMAGE_ENDINGS, MAX_CAPTION_BYTES, Sample, caption_lines

MAX_IDX_BYTES = 2**31


def list_idx(folder: Path, caption: str = "") -> list[Sample]:
    """The images of a pair of IDX files (LeCun, Cortes, Burges 1998), the training set where there are several; the
    caption of each is its label, a number, so none needs `caption`.

    Raises:
        FastsdError: no such files, or damaged ones.
    """
    found = sorted(folder.glob("*images*idx3-ubyte*")) if folder.is_dir() else []
    images = next((path for path in found if path.name.startswith("train")), found[0] if found else None)
    if images is None:
        raise FastsdError("no *-images-idx3-ubyte file here; data.path should be a folder with one", path=folder)
    labels_path = images.with_name(images.name.replace("images", "labels").replace("idx3", "idx1"))
    pixels, labels = read_idx(images, 3), read_idx(labels_path, 1)
    if len(pixels) != len(labels):
        raise FastsdError(f"{len(pixels)} images but {len(labels)} labels", path=images)

    def reader(row: int) -> Callable[[], bytes]:
        def read() -> bytes:
            file = io.BytesIO()
            Image.fromarray(pixels[row]).save(file, "BMP")
            return file.getvalue()

        return read

    return [Sample(f"{images.name}[{row}]", (str(label),), reader(row)) for row, label in enumerate(labels)]


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """An IDX file: two zero bytes, type (8: uint8), number of dimensions, sizes as big-endian int32, data.

    Raises:
        FastsdError: no such file, damaged, or too large.
    """
    if not path.is_file():
        raise FastsdError("no such file", path=path)
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            raw = file.read(MAX_IDX_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise FastsdError(f"damaged, cannot be decompressed ({error})", path=path) from None
    if len(raw) > MAX_IDX_BYTES:
        raise FastsdError(f"more than {MAX_IDX_BYTES // 2**30} GiB", path=path)
    start = 4 + 4 * dimensions
    sizes = [int.from_bytes(raw[i : i + 4], "big") for i in range(4, start, 4)]
    if raw[:4] != bytes([0, 0, 8, dimensions]) or len(raw) != start + math.prod(sizes):
        raise FastsdError(f"not an IDX file of bytes in {dimensions} dimensions", path=path)
    return np.frombuffer(raw, dtype=np.uint8, offset=start).reshape(sizes)


def list_shards(path: Path, caption: str = "") -> list[Sample]:
    """The samples of WebDataset shards: members of a tar file whose names agree up to the first dot.

    A shard is not unpacked; its members are read where they lie, sizes checked first. Images without a
    caption have `caption`.

    Raises:
        FastsdError: no shards, a file that is no plain tar, no images, no captions.
    """
    shards = sorted(path.glob("*.tar")) if path.is_dir() else [path] if path.is_file() else []
    if not shards:
        raise FastsdError("no .tar file here; data.path should be a WebDataset shard, or a folder of them", path=path)
    samples = []
    for shard in shards:
        try:
            with tarfile.open(shard, "r:") as tar:
                samples += _samples(shard, [member for member in tar if member.isfile()])
        except (tarfile.TarError, OSError) as error:
            raise FastsdError(f"not a plain tar file ({str(error):.80})", path=shard) from None
    if not samples:
        raise FastsdError(f"no images in {len(shards)} shards", path=path)
    if caption:
        samples = [sample if sample.captions else replace(sample, captions=(caption,)) for sample in samples]
    if not any(sample.captions for sample in samples):
        raise FastsdError(f'{len(samples)} images but no captions; "00.txt" beside "00.png" holds them', path=path)
    return samples


def _samples(shard: Path, members: list[tarfile.TarInfo]) -> list[Sample]:
    keyed: dict[str, dict[str, tarfile.TarInfo]] = {}
    for member in members:
        folder, _, name = member.name.rpartition("/")
        key, _, ending = name.partition(".")
        keyed.setdefault(f"{folder}/{key}", {})[f".{ending.lower()}"] = member
    samples = []
    for parts in keyed.values():
        image = next((parts[ending] for ending in IMAGE_ENDINGS if ending in parts), None)
        if image is not None:
            samples.append(Sample(f"{shard.name}/{image.name}", _captions(shard, parts), _member(shard, image)))
    return samples


def _member(shard: Path, member: tarfile.TarInfo, limit: int = MAX_BYTES) -> Callable[[], bytes]:
    def read() -> bytes:
        if member.size > limit:
            raise FastsdError(f"{member.size / 2**20:.0f} MiB; at most {limit // 2**20} MiB are read", path=shard)
        with open(shard, "rb") as file:
            file.seek(member.offset_data)
            return file.read(member.size)

    return read


def _captions(shard: Path, parts: dict[str, tarfile.TarInfo]) -> tuple[str, ...]:
    """Of the text file or the JSON of a sample; none where they cannot be read."""
    found: Any = []
    if ".txt" in parts and parts[".txt"].size <= MAX_CAPTION_BYTES:
        return caption_lines(_member(shard, parts[".txt"])(), shard, parts[".txt"].name)
    if ".json" in parts and parts[".json"].size <= MAX_CAPTION_BYTES:
        try:
            entry = json.loads(_member(shard, parts[".json"])())
        except ValueError:
            return ()
        found = entry.get("text", entry.get("caption", [])) if isinstance(entry, dict) else []
    texts = found if isinstance(found, list) else [found]
    return tuple(text.strip() for text in texts if isinstance(text, str) and text.strip())
