"""Reading tensors out of `.ckpt` files, which are pickles in a zip and could hold programs.

`torch.load(weights_only=True)` unpickles tensors and plain values alone, but guards neither against a small zip that
inflates nor against a tensor whose strides repeat one number 10^12 times. So the zip's members must be stored as they
are, the pickle must name nothing but what `pickle_globals` allows, and it is unpickled onto the meta device, which
takes no memory. What comes out is where each tensor's bytes are; they are read like those of a safetensors file.
"""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path
from typing import Any

import torch

from fastsd.errors import FastsdError
from fastsd.weights.formats import pickle_globals
from fastsd.weights.formats.safetensors_file import Entry

ZIP, PICKLE = b"PK\x03\x04", b"\x80"
MAX_PICKLE = 16 * 2**20  # bytes of data.pkl; the original checkpoints have a megabyte of it
MAX_MEMBERS = 2**16
_LOCAL_HEADER = 30  # bytes before the name of a zip's member


def is_pickle(path: Path) -> bool:
    """Whether a file begins like what `torch.save` writes, whatever its name says."""
    try:
        with open(path, "rb") as file:
            start = file.read(16)
    except OSError as error:
        raise FastsdError(f"{path}: cannot be read ({error.strerror})") from error
    # A pickle's protocol number follows its first byte; a safetensors file has its header's JSON at the ninth.
    return start.startswith(ZIP) or (start[:1] == PICKLE and start[1:2] <= b"\x05" and start[8:9] != b"{")


def read_pickle(path: Path, allow: bool) -> dict[str, Entry]:
    """The tensors of a checkpoint that `torch.save` wrote, by key; those of its `state_dict` where it has one.

    Raises:
        FastsdError: as `open_pickle` does; or it holds no table of tensors.
    """
    content, sizes = open_pickle(path, allow)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise FastsdError(f"{path}: not a checkpoint: a table of tensors is expected, it is {type(content).__name__}")
    return tensors_in(path, content, sizes)


def open_pickle(path: Path, allow: bool) -> tuple[Any, dict[int, int]]:
    """What `torch.save` wrote, its tensors on the meta device; and the bytes that start at each place of the file.

    Args:
        path: the file.
        allow: pickles are read only where the user says so.

    Raises:
        FastsdError: not allowed, malformed, compressed, or more than tensors and plain values; nothing of it was run.
    """
    if not allow:
        raise FastsdError(
            f"{path}: a pickle, which can hold programs; convert it to .safetensors, or allow it with --allow-pickle "
            "(allow_pickle=True)"
        )
    if _torch_version() < (2, 6):
        raise FastsdError(f"{path}: reading a pickle safely needs torch 2.6 or newer, this is {torch.__version__}")
    members = _members(path)
    names = _check_pickle(path, members)
    try:
        beside = torch.serialization.safe_globals(pickle_globals.stand_ins(names))
        with beside, open(path, "rb") as file:  # by its content, whatever its name says
            content = torch.load(file, map_location="meta", weights_only=True)
    except Exception as error:  # whatever a hostile pickle makes the unpickler raise
        why = " ".join(str(error).split())[:100] or type(error).__name__
        raise FastsdError(f"{path}: holds more than tensors, or is damaged; it is not read ({why})") from error
    return content, dict(members.values())


def tensors_in(path: Path, table: dict[Any, Any], sizes: dict[int, int]) -> dict[str, Entry]:
    """Where the bytes are of each tensor of a table that `open_pickle` gave.

    Raises:
        FastsdError: a tensor's strides or size are not those of bytes in the file.
    """
    return {
        key: _entry(path, key, value, sizes)
        for key, value in table.items()
        if isinstance(key, str) and isinstance(value, torch.Tensor)
    }


def _torch_version() -> tuple[int, ...]:
    return tuple(int(n) for n in torch.__version__.split(".")[:2])


def _members(path: Path) -> dict[str, tuple[int, int]]:
    """The zip's members: where each one's bytes start and how many they are. All are stored as they are."""
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            found = archive.infolist()
            if len(found) > MAX_MEMBERS:
                raise FastsdError(f"{path}: {len(found)} parts; no checkpoint has that many")
            members = {}
            for one in found:
                if one.compress_type != zipfile.ZIP_STORED or one.file_size != one.compress_size:
                    raise FastsdError(
                        f"{path}: its part {one.filename[:80]!r} is compressed, which torch.save never does; not read"
                    )
                file.seek(one.header_offset)
                header = file.read(_LOCAL_HEADER)
                if len(header) < _LOCAL_HEADER or not header.startswith(ZIP):
                    raise zipfile.BadZipFile
                start = one.header_offset + _LOCAL_HEADER + sum(struct.unpack_from("<HH", header, 26))
                if one.filename in members:
                    raise FastsdError(f"{path}: its part {one.filename[:80]!r} stands twice; not read")
                members[one.filename] = (start, one.file_size)
    except FastsdError:
        raise
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
        raise FastsdError(
            f"{path}: a pickle, but not a whole file as torch.save has written them since PyTorch 1.6; fetch it again"
        ) from error
    size, end = path.stat().st_size, 0
    for name, (start, length) in sorted(members.items(), key=lambda item: item[1]):
        if start < end or start + length > size:
            raise FastsdError(f"{path}: its part {name[:80]!r} overlaps another or the file's end; not read")
        end = start + length
    return members


def _check_pickle(path: Path, members: dict[str, tuple[int, int]]) -> set[tuple[str, str]]:
    """Refuse whatever refers to more than `pickle_globals` allows, before anything is unpickled, and name it.

    Returns:
        The names that it refers to.
    """
    pickles = [place for name, place in members.items() if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise FastsdError(f"{path}: a zip without a checkpoint in it: no data.pkl; give the checkpoint itself")
    start, length = pickles[0]
    if length > MAX_PICKLE:
        raise FastsdError(f"{path}: its data.pkl has {length >> 20} MB; no checkpoint has more than a few")
    with open(path, "rb") as file:
        file.seek(start)
        raw = file.read(length)
    try:
        names = set(pickle_globals.names(raw))
        known = pickle_globals.TENSORS | {pickle_globals.ENCODE}
        for name in sorted(names):
            if name not in known and not pickle_globals.stands_in(name):
                raise FastsdError(f"{path}: it refers to {'.'.join(name)[:120]}, not to tensors alone; it is not read")
        if pickle_globals.ENCODE in names and not pickle_globals.only_bytes_are_encoded(raw):
            raise FastsdError(f"{path}: it refers to _codecs.encode for more than bytes; it is not read")
        return names
    except FastsdError:
        raise
    except (ValueError, IndexError, UnicodeDecodeError, OverflowError, struct.error) as error:
        raise FastsdError(f"{path}: its data.pkl is damaged; fetch it again") from error


def _entry(path: Path, key: str, tensor: Any, sizes: dict[int, int]) -> Entry:
    """Where a tensor's bytes are. `sizes`: length of each of the zip's members by where it starts."""
    name = key[:120]
    start = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if start is None:
        raise FastsdError(f"{path}: torch {torch.__version__} does not say where tensors are; take a newer torch")
    if tensor.layout != torch.strided or tensor.is_quantized or start not in sizes:
        raise FastsdError(f"{path}: the key {name!r} has no bytes of its own in the file; it is not read")
    shape, strides = tuple(tensor.shape), tuple(tensor.stride())
    # Dense: every element has a place of its own and there are no gaps, whatever their order.
    count = 1
    for stride, n in sorted(zip(strides, shape, strict=True)):
        if n > 1 and stride != count:
            raise FastsdError(f"{path}: the key {name!r} has strides {strides} for {list(shape)}; it is not read")
        count *= n
    nbytes, skipped = count * tensor.dtype.itemsize, tensor.storage_offset() * tensor.dtype.itemsize
    if skipped < 0 or skipped + nbytes > sizes[start]:
        raise FastsdError(f"{path}: the key {name!r} needs {nbytes} bytes where the file holds {sizes[start]}")
    return Entry(path, tensor.dtype, shape, start + skipped, nbytes, key, None if tensor.is_contiguous() else strides)
