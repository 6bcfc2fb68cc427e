"""Weight files of zeros, which take no disk space."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from fastsd.weights.layouts.names import sources, stored_form


def write_zeros(module: nn.Module, file: Path, dtype: str, itemsize: int) -> None:
    """Write a network of zeros; the file system stores only its header."""
    header, end = {}, 0
    for _, _, parts in sources(module):
        for part in parts:
            shape = stored_form(part.key, torch.empty(part.shape, device="meta"), False).shape
            header[part.key] = {
                "dtype": dtype,
                "shape": list(shape),
                "data_offsets": [end, end + shape.numel() * itemsize],
            }
            end += shape.numel() * itemsize
    text = json.dumps(header).encode()
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        opened.truncate(8 + len(text) + end)
