"""Reading tensors from untrusted `.safetensors` files.

The format: eight bytes of header length, a JSON header, then the tensors' bytes. The safetensors library maps whole
files into memory, where the pages it reads count as resident. Here each tensor is read once, separately, into memory
of its own, so loading takes little more than the weights. Sizes are checked against the file before memory is taken.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch

from fastsd.errors import FastsdError
from fastsd.weights.formats.mistakes import what_it_is

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
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
EIGHT_BITS = tuple(dtype for name, dtype in DTYPES.items() if name.startswith("F8_"))
# Dtypes of the format that are read nowhere here: less than a byte, or a scale of others.
OTHER_DTYPES = ("F4", "F6_E2M3", "F6_E3M2", "F8_E8M0")
MAX_HEADER = 20_000_000  # bytes; the library allows five times as many, checkpoints have fewer than one million
MAX_ITEMS = 300_000  # commas and brackets in the header; bounds the memory of its objects
MAX_DIMENSIONS = 8
_FIELDS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: where its bytes are and how to read them."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # from the beginning of the file
    nbytes: int
    key: str = ""  # its name in the file
    strides: tuple[int, ...] | None = None  # of its elements, if the file does not store them contiguously
    scale: float | None = None  # which its values are multiplied by (`fastsd.weights.formats.scaled`)

    def transposed(self) -> TensorEntry:
        """The transposed matrix, on the same bytes."""
        rows, columns = self.shape
        return replace(self, shape=(columns, rows), strides=(1, columns) if self.strides is None else None)

    def third(self, i: int) -> TensorEntry:
        """The i-th third of the rows: q, k or v of a fused matrix."""
        nbytes = self.nbytes // 3
        return replace(self, shape=(self.shape[0] // 3, *self.shape[1:]), start=self.start + i * nbytes, nbytes=nbytes)

    def read(self, buffer: torch.Tensor | None = None) -> torch.Tensor:
        """The tensor on the CPU, at the beginning of `buffer` (uint8, large enough) or in memory of its own.

        Numbers of 8 bits, which PyTorch hardly computes with, and those with a scale come in fp32.
        """
        tensor = self._read(buffer)
        if self.dtype in EIGHT_BITS or self.scale is not None:
            tensor = tensor.float()
        return tensor if self.scale is None else tensor * self.scale

    def _read(self, buffer: torch.Tensor | None) -> torch.Tensor:
        if buffer is None:
            buffer = torch.empty(self.nbytes, dtype=torch.uint8, device="cpu")
        flat = buffer[: self.nbytes].view(self.dtype)
        tensor = flat.view(self.shape) if self.strides is None else flat.as_strided(self.shape, self.strides)
        if self.nbytes == 0:
            return tensor
        target = memoryview(buffer[: self.nbytes].numpy().data)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.start)
            done = 0
            while done < self.nbytes:
                count = file.readinto(target[done:])
                if not count:
                    raise FastsdError("the file ends in the middle of a tensor; download it again", path=self.path)
                done += count
        return tensor


def read_header(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """The tensors of a file by name, and its metadata.

    Raises:
        FastsdError: not a complete, well-formed safetensors file; the message names the file and the defect, and says
            to download it again only if it is cut short.
    """
    try:
        if not path.is_file():
            raise FastsdError(f"{'not a regular file' if path.exists() else 'no such file'}", path=path)
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            start = file.read(64)
            length = int.from_bytes(start[:8], "little")
            if start[8:9] != b"{" and (kind := what_it_is(start)):
                raise FastsdError(kind, path=path)
            if len(start) < 8 or length > size - 8:
                if start[8:9] not in (b"", b"{") or (length > MAX_HEADER and len(start) >= 8):
                    raise FastsdError("not a safetensors file: its header is longer than the file", path=path)
                raise _cut_short(path, f"its header is longer than the file{', which is empty' * (not size)}")
            if length > MAX_HEADER:
                raise _malformed(path, f"its header has {length} bytes; checkpoints have fewer than {MAX_HEADER}")
            file.seek(8)
            raw = file.read(length)
    except OSError as error:
        raise FastsdError(f"cannot be read ({error.strerror})", path=path) from error
    return parse_header(path, raw, size)


def looks_like_safetensors(path: Path) -> bool:
    """Whether a file begins with a header's length and its bracket, whatever its name says."""
    with open(path, "rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") <= MAX_HEADER


def parse_header(path: Path, raw: bytes, size: int) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """What `read_header` returns, from the header's bytes of a file of `size` bytes."""
    if sum(raw.count(character) for character in (b",", b"[", b"{")) > MAX_ITEMS:
        raise _malformed(path, f"its header has more than {MAX_ITEMS} items")
    try:
        header = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=lambda pairs: _unique(path, pairs),
            parse_int=_size_or_offset,
            parse_constant=_refuse_constant,
        )
    except RecursionError as error:
        raise _malformed(path, "its header is nested too deeply") from error
    except FastsdError:
        raise
    except ValueError as error:
        raise _malformed(path, "its header is not JSON") from error
    if not isinstance(header, dict):
        raise _malformed(path, "its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _malformed(path, "its metadata is not a table of strings")
    try:
        for text in (*header, *metadata, *metadata.values()):
            text.encode()
    except UnicodeEncodeError as error:
        raise _malformed(path, "a string in its header is not Unicode") from error
    data = 8 + len(raw)
    entries = {name: _entry(path, name, value, data, size) for name, value in header.items()}
    _check_layout(path, entries, data, size)
    return entries, metadata


def _size_or_offset(digits: str) -> int:
    """An integer of the header; -1, which every field refuses, if it is too large or negative."""
    return int(digits) if len(digits) <= 19 and digits[0] != "-" else -1


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _unique(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        duplicate = next(name for name in result if names.count(name) > 1) if len(pairs) < 10000 else ""
        raise _malformed(path, f"the key {duplicate[:80]!r} appears twice in its header")
    return result


def _entry(path: Path, name: str, value: Any, data: int, size: int) -> TensorEntry:
    """Check one header entry against the file's size and its own shape."""
    what = f"the key {name[:80]!r}"
    if not isinstance(value, dict) or set(value) != _FIELDS:
        raise _malformed(path, f"{what} should have exactly a dtype, a shape and data_offsets")
    kind, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if kind in OTHER_DTYPES:
        raise FastsdError(f"{what} has the dtype {kind}, which fastsd does not read; give fp16 weights", path=path)
    if not isinstance(kind, str) or kind not in DTYPES:
        raise _malformed(path, f"{what} has the dtype {str(kind)[:20]!r}; fastsd reads {', '.join(DTYPES)}")
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        raise _malformed(path, f"{what} should have a list for its shape and two data_offsets")
    if len(shape) > MAX_DIMENSIONS:
        raise _malformed(path, f"{what} has {len(shape)} dimensions")
    if not all(type(n) is int and 0 <= n < 2**48 for n in (*shape, *offsets)):
        raise _malformed(path, f"{what} has an impossible shape or offset")
    begin, end = offsets
    if not begin <= end <= size - data:
        reason = f"{what} has offsets {begin} to {end}, beyond the file's {size - data} bytes of data"
        raise _cut_short(path, reason) if begin <= end else _malformed(path, reason)
    dtype = DTYPES[kind]
    count = dtype.itemsize
    for n in shape:
        count *= n
    if count != end - begin:
        raise _malformed(path, f"{what} holds {end - begin} bytes, its shape needs {count}")
    return TensorEntry(path, dtype, tuple(shape), data + begin, end - begin, name)


def _check_layout(path: Path, entries: dict[str, TensorEntry], data: int, size: int) -> None:
    """Check the format's rule: the tensors fill the rest of the file without holes or overlaps."""
    position = data
    for entry in sorted(entries.values(), key=lambda e: (e.start, e.nbytes)):
        if entry.start != position:
            defect = "overlaps another" if entry.start < position else "leaves a hole before it"
            raise _malformed(path, f"the key {entry.key[:80]!r} {defect}")
        position += entry.nbytes
    if position != size:
        raise _malformed(path, f"it has {size} bytes, its header accounts for {position}")


def _malformed(path: Path, reason: str) -> FastsdError:
    return FastsdError(f"not a well-formed safetensors file: {reason}", path=path)


def _cut_short(path: Path, reason: str) -> FastsdError:
    return FastsdError(f"not a complete safetensors file: {reason}; download it again", path=path)
