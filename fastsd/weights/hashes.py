"""SHA-256 of model files, by which A1111 and model sites name them, without reading gigabytes for each picture.

A checkpoint's hash is known where something has read the whole file already: `fastsd inspect`, which writes it down;
and huggingface_hub, whose cache calls a large file by it. A LoRA is small, and is read whole anyway.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from fastsd.files import cache_folder, write_whole

LIMIT = 1000  # files that are remembered, the latest ones
_DIGEST = re.compile(r"[0-9a-f]{64}")


def known_sha256(path: Path) -> str | None:
    """The SHA-256 of a file, if it is known; a file that was changed since has another size or time."""
    try:
        if path.is_symlink():
            blob = Path(os.readlink(path))  # ../../blobs/SHA-256; where that points to in turn has other names
            if blob.parent.name == "blobs" and _DIGEST.fullmatch(blob.name):
                return blob.name
        found = _remembered().get(str(path.resolve()))
        return found["sha256"] if isinstance(found, dict) and found == _entry(path, found.get("sha256")) else None
    except OSError:
        return None


def remember_sha256(path: Path, digest: str) -> None:
    """Write down the SHA-256 of a file for `known_sha256`; where that cannot be written, it is not known later."""
    with contextlib.suppress(OSError):
        name = str(path.resolve())
        known = {key: value for key, value in _remembered().items() if key != name} | {name: _entry(path, digest)}
        content = json.dumps(dict(list(known.items())[-LIMIT:]))
        _file().parent.mkdir(parents=True, exist_ok=True)
        write_whole(_file(), content.encode(), overwrite=True)


def adapter_hash(data: bytes) -> str:
    """A1111's short hash of a LoRA in a safetensors file: of its tensors alone, so that its metadata may change.

    Returns:
        The first 12 hexadecimal digits of the SHA-256 of what follows the header ("AutoV3" of model sites).
    """
    start = 8 + int.from_bytes(data[:8], "little")
    return hashlib.sha256(memoryview(data)[start:]).hexdigest()[:12]


def _file() -> Path:
    return cache_folder() / "hashes.json"


def _remembered() -> dict[str, Any]:
    try:
        found = json.loads(_file().read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _entry(path: Path, digest: Any) -> dict[str, Any]:
    status = path.stat()
    return {"size": status.st_size, "time": status.st_mtime_ns, "sha256": digest}
