"""Checkpoints of a training stage: atomic writes, bit-exact reads."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from fastsd.errors import FastsdError
from fastsd.files import open_whole, reason


def save(state: dict[str, Any], path: Path) -> None:
    """Write `state` (tensors, numbers, lists, dicts) atomically: an interrupted write leaves the old file.

    The bytes go to a hidden file, are flushed to the disk, and then take the name.

    Raises:
        FastsdError: it cannot be written, as where the disk is full. What stood at `path` is still there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_whole(path, overwrite=True) as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        kept = "; the checkpoint before it is kept" if path.exists() else ""
        raise FastsdError(f"not written, {reason(cause)}{kept}", path=path) from error


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint without executing anything in it.

    Raises:
        FastsdError: the file is damaged or not a checkpoint.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise FastsdError(f"cannot be read as a checkpoint ({first:.80}); delete it to start over", path=path) from None
    if not isinstance(state, dict):
        raise FastsdError("not a checkpoint; delete it to start over", path=path)
    return state
