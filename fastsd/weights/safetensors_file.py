"""Reading tensors out of `.safetensors` files that nobody vouches for.

The format: eight bytes of header length, a JSON header, then the tensors' bytes. The safetensors library maps whole
files into memory, where read pages count as resident; here each tensor is read by itself, once, into memory of its
own, so that loading takes little more than the weights. Sizes are checked against the file before memory is taken.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastsd.errors import FastsdError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MAX_HEADER = 100_000_000  # bytes; the safetensors library's own limit
MAX_DIMENSIONS = 8


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: where its bytes are and what they mean."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # from the beginning of the file
    nbytes: int

    def read(self) -> torch.Tensor:
        """The tensor, in memory of its own, on the CPU."""
        tensor = torch.empty(self.shape, dtype=self.dtype)
        if self.nbytes == 0:
            return tensor
        buffer = memoryview(tensor.view(-1).view(torch.uint8).numpy().data)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.start)
            done = 0
            while done < self.nbytes:
                count = file.readinto(buffer[done:])
                if not count:
                    raise FastsdError(f"{self.path}: the file ends in the middle of a tensor; fetch it again")
                done += count
        return tensor


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of a file by name, and its metadata.

    Raises:
        FastsdError: not a whole, well-formed safetensors file; the message names the file and what is wrong.
    """
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(size - 8, MAX_HEADER):
                raise _malformed(path, "its header is longer than the file")
            raw = file.read(length)
    except OSError as error:
        raise FastsdError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=lambda pairs: _unique(path, pairs))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise _malformed(path, "its header is not JSON") from error
    if not isinstance(header, dict):
        raise _malformed(path, "its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _malformed(path, "its metadata are not strings")
    entries = {name: _entry(path, name, value, 8 + length, size) for name, value in header.items()}
    _check_layout(path, entries, 8 + length, size)
    return entries, metadata


def _unique(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise _malformed(path, "a key stands twice in its header")
    return result


def _entry(path: Path, name: str, value: Any, data: int, size: int) -> Entry:
    """Check one header entry against the file's size and its own shape."""
    try:
        dtype, shape, (begin, end) = DTYPES[value["dtype"]], value["shape"], value["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise _malformed(path, f"the entry {name[:80]!r} lacks a known dtype, a shape or offsets") from error
    numbers = [*shape, begin, end] if isinstance(shape, list) and len(shape) <= MAX_DIMENSIONS else [-1]
    if not all(type(n) is int and 0 <= n < 2**48 for n in numbers) or not begin <= end <= size - data:
        raise _malformed(path, f"the entry {name[:80]!r} has an impossible shape or offset")
    count = dtype.itemsize
    for n in shape:
        count *= n
    if count != end - begin:
        raise _malformed(path, f"the entry {name[:80]!r} holds {end - begin} bytes where its shape needs {count}")
    return Entry(path, dtype, tuple(shape), data + begin, end - begin)


def _check_layout(path: Path, entries: dict[str, Entry], data: int, size: int) -> None:
    """The tensors must fill the rest of the file without holes or overlaps (the format's rule)."""
    position = data
    for entry in sorted(entries.values(), key=lambda e: (e.start, e.nbytes)):
        if entry.start != position:
            raise _malformed(path, "its tensors overlap or leave a hole")
        position += entry.nbytes
    if position != size:
        raise _malformed(path, f"it has {size} bytes where its header accounts for {position}")


def _malformed(path: Path, why: str) -> FastsdError:
    return FastsdError(f"{path}: not a whole safetensors file: {why}; fetch it again")
