"""Checkpoints of a training stage: written whole or not at all, read back exactly."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from fastsd.errors import FastsdError
from fastsd.files import open_whole


def save(state: dict[str, Any], path: Path) -> None:
    """Write `state` (tensors, numbers, lists, dicts); `path` is the old file or the new one, never a part of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_whole(path, overwrite=True) as file:
        torch.save(state, file)


def load(path: Path) -> dict[str, Any]:
    """Read what `save` wrote; nothing in the file is executed.

    Raises:
        FastsdError: the file is damaged or is no checkpoint.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FastsdError(f"{path}: cannot be read as a checkpoint ({reason:.80}); delete it to train anew") from None
    if not isinstance(state, dict):
        raise FastsdError(f"{path}: not a checkpoint; delete it to train anew")
    return state
