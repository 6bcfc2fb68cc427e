"""SHA-256 hashes of model files, by which A1111 and model sites identify them.

Generating an image must not read gigabytes for a hash. So a checkpoint's hash is known only if something else has read
the whole file: `fastsd inspect`, which stores it; or huggingface_hub, which names large files in its cache by it. A
LoRA is small and is read completely anyway.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from fastsd.errors import FastsdError
from fastsd.files import cache_folder, write_whole

LIMIT = 1000  # the number of files remembered, latest first
_DIGEST = re.compile(r"[0-9a-f]{64}")


def known_sha256(path: Path) -> str | None:
    """The SHA-256 of a file, or None if it is unknown or the file has changed since, in size or time."""
    try:
        if path.is_symlink():
            blob = Path(os.readlink(path))  # ../../blobs/SHA-256; the blob may be a link too, to other names
            if blob.parent.name == "blobs" and _DIGEST.fullmatch(blob.name):
                return blob.name
        record = _remembered().get(str(path.resolve()))
        return record["sha256"] if isinstance(record, dict) and record == _record(path, record.get("sha256")) else None
    except (OSError, FastsdError):
        return None


def remember_sha256(path: Path, digest: str) -> None:
    """Store the SHA-256 of a file for `known_sha256`; if the cache cannot be written, the hash stays unknown."""
    with contextlib.suppress(OSError, FastsdError):
        name = str(path.resolve())
        known = {key: value for key, value in _remembered().items() if key != name} | {name: _record(path, digest)}
        content = json.dumps(dict(list(known.items())[-LIMIT:]))
        _file().parent.mkdir(parents=True, exist_ok=True)
        write_whole(_file(), content.encode(), overwrite=True)


def adapter_hash(data: bytes) -> str:
    """A1111's short hash of a LoRA in a safetensors file. It covers only the tensors, so edited metadata keeps it.

    Returns:
        The first 12 hexadecimal digits of the SHA-256 of the bytes after the header ("AutoV3" on model sites).
    """
    start = 8 + int.from_bytes(data[:8], "little")
    return hashlib.sha256(memoryview(data)[start:]).hexdigest()[:12]


def legacy_hash(path: Path) -> str:
    """A1111's hash of a file from before November 2022 (`model_hash` in its modules/sd_models.py), by which its
    ControlNet extension still names files: the first 8 digits of the SHA-256 of 64 KiB that start at 1 MiB.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        file.seek(2**20)
        return hashlib.sha256(file.read(2**16)).hexdigest()[:8]


def _file() -> Path:
    return cache_folder() / "hashes.json"


def _remembered() -> dict[str, Any]:
    try:
        records = json.loads(_file().read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return records if isinstance(records, dict) else {}


def _record(path: Path, digest: Any) -> dict[str, Any]:
    status = path.stat()
    return {"size": status.st_size, "time": status.st_mtime_ns, "sha256": digest}
