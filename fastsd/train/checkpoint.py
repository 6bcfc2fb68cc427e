"""Checkpoints of a training stage: written whole or not at all, read back exactly."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from fastsd.errors import FastsdError


def save(state: dict[str, Any], path: Path) -> None:
    """Write `state` (tensors, numbers, lists and dicts of them) so that `path` is either the old file or the new one.

    The bytes go to a file beside it and reach the disk before the name changes hands, so neither a kill nor a loss of
    power leaves half a checkpoint.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


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
