"""Reading tensors from `.ckpt` files: pickles in a zip archive, which could hold programs.

`torch.load(weights_only=True)` unpickles only tensors and plain values, but it stops neither a small zip that inflates
nor a tensor whose strides repeat one value 10^12 times. So three checks come first: the zip's members must be stored
uncompressed, the pickle may refer only to what `pickle_globals` allows, and it is unpickled onto the meta device, which
takes no memory. The result is where each tensor's bytes are; they are then read like those of a safetensors file.
"""

from __future__ import annotations

import struct
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastsd.errors import FastsdError
from fastsd.weights.formats import pickle_globals
from fastsd.weights.formats.legacy_pickle import LegacyTensor, is_legacy, open_legacy
from fastsd.weights.formats.mistakes import what_it_is
from fastsd.weights.formats.pickle_globals import GlobalName
from fastsd.weights.formats.safetensors_file import TensorEntry

ZIP, PICKLE = b"PK\x03\x04", b"\x80"
MAX_PICKLE = 16 * 2**20  # bytes of data.pkl; the original checkpoints have a megabyte of it
MAX_MEMBERS = 2**16
WRAPPERS = ("state_dict", "params_ema", "params-ema", "params", "model_state_dict")  # what a table may stand under
_LOCAL_HEADER = 30  # bytes before the name of a zip member

Members = dict[str, tuple[int, int]]  # name: start and length of the bytes


def is_pickle(path: Path) -> bool:
    """Whether a file begins like what `torch.save` writes, whatever its name says."""
    try:
        with open(path, "rb") as file:
            start = file.read(16)
    except OSError as error:
        raise FastsdError(f"cannot be read ({error.strerror})", path=path) from error
    # A pickle's second byte is its protocol number; a safetensors file starts its JSON header at the ninth byte.
    return start.startswith(ZIP) or (start[:1] == PICKLE and start[1:2] <= b"\x05" and start[8:9] != b"{")


def read_pickle(path: Path, allow: bool, lists: bool = False) -> dict[str, TensorEntry]:
    """The tensors of a checkpoint that `torch.save` wrote, by key; those of its `state_dict` if it has one.

    Upscalers have their table under other names (`WRAPPERS`). Where all that it holds are tables (IP-Adapter's two),
    keys are "table.key".

    With `lists`, a list of tensors is read too, under the keys "0", "1", and so on.

    Raises:
        FastsdError: as `open_pickle` does; or the file holds no table of tensors.
    """
    content, sizes = open_pickle(path, allow)
    if isinstance(content, dict):
        content = next((content[name] for name in WRAPPERS if isinstance(content.get(name), dict)), content)
    if (
        lists
        and isinstance(content, list)
        and content
        and all(isinstance(value, torch.Tensor | TensorEntry) for value in content)
    ):
        content = {str(i): value for i, value in enumerate(content)}  # cloneofsimo's LoRAs
    if isinstance(content, dict) and content and all(isinstance(value, dict) for value in content.values()):
        content = {f"{name}.{key}": value for name, table in content.items() for key, value in table.items()}
    if not isinstance(content, dict):
        raise FastsdError(f"not a checkpoint: it holds a {type(content).__name__}, not a table of tensors", path=path)
    return tensors_in(path, content, sizes)


def open_pickle(path: Path, allow: bool) -> tuple[Any, dict[int, int]]:
    """Unpickle what `torch.save` wrote, without running anything in it.

    Args:
        path: the file.
        allow: the user has allowed pickles.

    Returns:
        The content with its tensors on the meta device, and the length of each zip member by its start in the file. Of
        a file from before PyTorch 1.6 the tensors are entries, and there are no members.

    Raises:
        FastsdError: not allowed, malformed, compressed, or more than tensors and plain values.
    """
    if not allow:
        raise FastsdError(
            "a pickle, which can hold programs; convert it to .safetensors, or allow it with {allow_pickle}",
            path=path,
        )
    if _torch_version() < (2, 6):
        raise FastsdError(f"reading a pickle safely needs torch 2.6 or newer, this is {torch.__version__}", path=path)
    if is_legacy(path):
        content, places = open_legacy(path)
        try:
            return _placed(path, content, places, {}), {}
        except RecursionError as error:
            raise FastsdError("refused: no checkpoint is nested that deeply", path=path) from error
    members = _members(path)
    names = _check_pickle(path, members)
    try:
        allowed = torch.serialization.safe_globals(pickle_globals.placeholders(names))
        with allowed, open(path, "rb") as file:  # a file object, so that torch ignores the name
            content = torch.load(file, map_location="meta", weights_only=True)
    except Exception as error:  # a hostile pickle can make the unpickler raise anything
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise FastsdError(f"refused: it holds more than tensors, or is damaged ({reason})", path=path) from error
    return content, dict(members.values())


def tensors_in(path: Path, table: dict[Any, Any], sizes: dict[int, int]) -> dict[str, TensorEntry]:
    """Where the bytes of each tensor are, for a table and the sizes from `open_pickle`.

    Raises:
        FastsdError: a tensor's strides or size do not match bytes in the file.
    """
    return {
        key: replace(value, key=key) if isinstance(value, TensorEntry) else _entry(path, key, value, sizes)
        for key, value in table.items()
        if isinstance(key, str) and isinstance(value, torch.Tensor | TensorEntry)
    }


def _placed(path: Path, content: Any, places: dict[str, tuple[int, int]], done: dict[int, Any]) -> Any:
    """Content of an old file with an entry for each tensor in its tables and lists; `done` by the ids of those."""
    if isinstance(content, dict | list) and id(content) not in done:
        if isinstance(content, dict):
            table = done[id(content)] = dict[Any, Any]()
            table.update((key, _placed(path, value, places, done)) for key, value in content.items())
        else:
            items = done[id(content)] = list[Any]()
            items += [_placed(path, value, places, done) for value in content]
    if not isinstance(content, LegacyTensor):
        return done.get(id(content), content)
    name, one = content.storage, content
    if name not in places:
        raise FastsdError(f"refused: its storage {name[:40]!r} has no bytes in the file", path=path)
    return _dense(path, name, one.dtype, one.shape, one.strides, one.offset, places[name])


def _torch_version() -> tuple[int, ...]:
    return tuple(int(n) for n in torch.__version__.split(".")[:2])


def _members(path: Path) -> Members:
    """The zip's members, all of them stored uncompressed and none overlapping another."""
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            infos = archive.infolist()
            if len(infos) > MAX_MEMBERS:
                raise FastsdError(f"{len(infos)} parts; no checkpoint has that many", path=path)
            members: Members = {}
            for info in infos:
                name = info.filename
                if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                    raise FastsdError(
                        f"refused: its part {name[:80]!r} is compressed, which torch.save never does", path=path
                    )
                file.seek(info.header_offset)
                header = file.read(_LOCAL_HEADER)
                if len(header) < _LOCAL_HEADER or not header.startswith(ZIP):
                    raise zipfile.BadZipFile
                start = info.header_offset + _LOCAL_HEADER + sum(struct.unpack_from("<HH", header, 26))
                if name in members:
                    raise FastsdError(f"refused: its part {name[:80]!r} appears twice", path=path)
                members[name] = (start, info.file_size)
    except FastsdError:
        raise
    except OSError as error:
        raise FastsdError(f"cannot be read ({error.strerror})", path=path) from error
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error) as error:
        raise FastsdError(_not_a_zip(path, error), path=path) from error
    _check_overlaps(path, members)
    return members


def _not_a_zip(path: Path, error: Exception) -> str:
    """Why a file is not the zip that torch.save writes. Only one that is cut short is worth fetching again."""
    with open(path, "rb") as file:
        start = file.read(64)
    if start.startswith(ZIP):
        if isinstance(error, NotImplementedError):
            return "a zip of a kind that torch.save never writes"
        return "a pickle, but not a complete file of torch.save (PyTorch 1.6 or newer); download it again"
    if start.startswith(PICKLE):
        return (
            "a pickle, but not in the form that torch.save has had since PyTorch 1.6; load it where you trust it, and "
            "save it again"
        )
    return what_it_is(start) or f"not a file of torch.save{', it is empty' * (not start)}"


def _check_overlaps(path: Path, members: Members) -> None:
    size, end = path.stat().st_size, 0
    for name, (start, length) in sorted(members.items(), key=lambda item: item[1]):
        if start < end or start + length > size:
            raise FastsdError(f"refused: its part {name[:80]!r} overlaps another or the file's end", path=path)
        end = start + length


def _check_pickle(path: Path, members: Members) -> set[GlobalName]:
    """Before anything is unpickled, refuse a pickle that refers to more than `pickle_globals` allows.

    Returns:
        The names it refers to.
    """
    pickles = [span for name, span in members.items() if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise FastsdError("a zip that holds no checkpoint (no data.pkl); give the checkpoint itself", path=path)
    start, length = pickles[0]
    if length > MAX_PICKLE:
        raise FastsdError(f"its data.pkl has {length >> 20} MB; no checkpoint has more than a few", path=path)
    with open(path, "rb") as file:
        file.seek(start)
        raw = file.read(length)
    try:
        names = set(pickle_globals.global_names(raw))
        known = pickle_globals.TENSORS | {pickle_globals.ENCODE}
        for name in sorted(names):
            if name not in known and not pickle_globals.has_placeholder(name):
                raise FastsdError(f"refused: it refers to {'.'.join(name)[:120]}, not only to tensors", path=path)
        if pickle_globals.ENCODE in names and not pickle_globals.encodes_bytes_only(raw):
            raise FastsdError("refused: it calls _codecs.encode for more than bytes", path=path)
        return names
    except FastsdError:
        raise
    except (ValueError, IndexError, UnicodeDecodeError, OverflowError, struct.error) as error:
        raise FastsdError("its data.pkl is damaged", path=path) from error


def _entry(path: Path, key: str, tensor: Any, sizes: dict[int, int]) -> TensorEntry:
    """Where a tensor's bytes are. `sizes`: length of each zip member by its start."""
    name = key[:120]
    start = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if start is None:
        raise FastsdError(
            f"torch {torch.__version__} does not say where tensors are stored; use a newer torch", path=path
        )
    if tensor.layout != torch.strided or tensor.is_quantized or start not in sizes:
        raise FastsdError(f"refused: the key {name!r} has no bytes of its own in the file", path=path)
    place = start, sizes[start]
    entry = _dense(path, name, tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), place)
    return replace(entry, key=key)


def _dense(
    path: Path,
    name: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    offset: int,
    place: tuple[int, int],
) -> TensorEntry:
    """A tensor on a storage, whose bytes have this start and length.

    Raises:
        FastsdError: its strides or its size do not match the storage.
    """
    # Dense: the elements, in whatever order, neither share bytes nor leave gaps.
    count, contiguous = 1, list[int]()
    for n in reversed(shape):
        contiguous.insert(0, count)
        count *= max(n, 1)
    in_order = all(stride == own or n == 1 for stride, own, n in zip(strides, contiguous, shape, strict=True))
    count = 1
    for stride, n in sorted(zip(strides, shape, strict=True)):
        if n > 1 and stride != count:
            raise FastsdError(f"refused: the key {name!r} has strides {strides} for the shape {list(shape)}", path=path)
        count *= n
    (start, length), nbytes, skipped = place, count * dtype.itemsize, offset * dtype.itemsize
    if skipped < 0 or skipped + nbytes > length:
        raise FastsdError(f"the key {name!r} needs {nbytes} bytes, the file holds {length}", path=path)
    return TensorEntry(path, dtype, shape, start + skipped, nbytes, name, None if in_order else strides)
