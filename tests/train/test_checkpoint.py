"""Checkpoints are written atomically."""

from __future__ import annotations

import contextlib
import errno
import io
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastsd.errors import FastsdError
from fastsd.train import checkpoint


def test_interrupted_write_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "stage.pt"
    checkpoint.save({"step": 1, "w": torch.ones(3)}, path)

    def interrupted(state: object, file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save({"step": 2}, path)
    monkeypatch.undo()
    assert checkpoint.load(path)["step"] == 1
    checkpoint.save({"step": 3}, path)
    assert checkpoint.load(path)["step"] == 3 and [p.name for p in tmp_path.iterdir()] == ["stage.pt"]


@pytest.mark.parametrize("full_at", ["write", "fsync"])
def test_a_full_disk_leaves_the_last_checkpoint_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full_at: str
) -> None:
    path = tmp_path / "stage.pt"
    checkpoint.save({"step": 1, "w": torch.ones(3)}, path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    class FullFile(io.BytesIO):
        def write(self, data: object) -> int:  # type: ignore[override]
            full()
            return 0

    @contextlib.contextmanager
    def opened(*_: object, **__: object) -> Iterator[FullFile]:
        yield FullFile()

    with monkeypatch.context() as patch:
        if full_at == "fsync":
            patch.setattr(os, "fsync", full)
        else:
            patch.setattr(checkpoint, "open_whole", opened)
        with pytest.raises(FastsdError) as caught:
            checkpoint.save({"step": 2, "w": torch.ones(5000)}, path)
    assert str(caught.value) == f"{path}: not written, the disk is full; the checkpoint before it is kept"
    assert checkpoint.load(path)["step"] == 1 and [p.name for p in tmp_path.iterdir()] == ["stage.pt"]


def test_a_file_without_a_state_is_not_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "stage.pt"
    torch.save([1, 2], path)
    with pytest.raises(FastsdError, match=r"stage\.pt: not a checkpoint"):
        checkpoint.load(path)
