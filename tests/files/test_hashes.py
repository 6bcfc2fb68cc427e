"""Known SHA-256 hashes of model files, and the short hash of a LoRA."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from fastsd.files.hashes import adapter_hash, known_sha256, remember_sha256

DIGEST = "0123456789abcdef" * 4


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTSD_CACHE", str(tmp_path / "kept"))
    return tmp_path / "kept"


def test_a_stored_hash_is_known_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"x")
    assert known_sha256(file) is None
    remember_sha256(file, DIGEST)
    assert known_sha256(file) == DIGEST
    monkeypatch.chdir(tmp_path)
    assert known_sha256(Path("a.safetensors")) == DIGEST
    (tmp_path / "link").symlink_to(file)
    assert known_sha256(tmp_path / "link") == DIGEST
    time = file.stat().st_mtime_ns
    file.write_bytes(b"y")
    os.utime(file, ns=(time + 1, time + 1))
    assert known_sha256(file) is None
    file.unlink()
    assert known_sha256(file) is None


def test_a_damaged_or_unwritable_cache_is_not_an_error(tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"x")
    remember_sha256(file, DIGEST)
    for content in ("", "[]", "{", f'{{"{file}": 3}}', f'{{"{file}": {{"sha256": "{DIGEST}"}}}}', "[" * 100_000):
        (cache / "hashes.json").write_text(content)
        assert known_sha256(file) is None
    remember_sha256(file, DIGEST)
    assert known_sha256(file) == DIGEST and os.listdir(cache) == ["hashes.json"]
    (cache / "hashes.json").unlink()
    cache.rmdir()
    cache.write_text("a file where the folder should be")
    remember_sha256(file, DIGEST)
    assert known_sha256(file) is None


def test_the_hubs_cache_names_a_large_file_by_its_hash(tmp_path: Path) -> None:
    """Small files are named by git's SHA-1. A blob may be a link itself, whose target has another name."""
    for folder in ("blobs", "shared", "snapshots/c"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "shared" / ("f" * 64)).write_bytes(b"x")
    (tmp_path / "blobs" / DIGEST).symlink_to(tmp_path / "shared" / ("f" * 64))
    (tmp_path / "blobs" / DIGEST[:40]).write_bytes(b"x")
    names = {
        "large": f"../../blobs/{DIGEST}",
        "small": f"../../blobs/{DIGEST[:40]}",
        "else": f"../../shared/{'f' * 64}",
    }
    for name, target in names.items():
        (tmp_path / "snapshots" / "c" / name).symlink_to(target)
    assert known_sha256(tmp_path / "snapshots" / "c" / "large") == DIGEST
    assert known_sha256(tmp_path / "snapshots" / "c" / "small") is None
    assert known_sha256(tmp_path / "snapshots" / "c" / "else") is None


def test_a_loras_hash_ignores_its_metadata(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0), "b": torch.ones(2, 2)}
    save_file(tensors, tmp_path / "named.safetensors", {"ss_output_name": "ink"})
    stored = torch.cat([tensors["a"], tensors["b"].flatten()]).numpy().tobytes()
    expected = hashlib.sha256(stored).hexdigest()[:12]
    assert adapter_hash((tmp_path / "named.safetensors").read_bytes()) == adapter_hash(save(tensors)) == expected
