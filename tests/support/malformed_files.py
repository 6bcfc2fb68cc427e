"""Writers of damaged and hostile files: `writer(path, tensors)` writes one, given a complete SD 1 checkpoint."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.support.original import Tensors

Writer = Callable[[Path, Tensors], Any]


def raw(data: bytes) -> Writer:
    return lambda path, _: path.write_bytes(data)


def header(text: str | bytes, data: int = 0) -> Writer:
    """A safetensors file with that header and `data` zero bytes after it."""
    encoded = text.encode() if isinstance(text, str) else text
    return raw(len(encoded).to_bytes(8, "little") + encoded + bytes(data))


def entry(**changes: Any) -> Writer:
    """One tensor of two fp32 values, with changes to its header fields; None removes a field."""
    fields = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}
    return header(json.dumps({"the.key": {k: v for k, v in fields.items() if v is not None}}), 8)


def entries(*spans: tuple[int, int], data: int = 16) -> Writer:
    """Tensors of bytes at those offsets."""
    tensors = {f"key{i}": {"dtype": "U8", "shape": [b - a], "data_offsets": [a, b]} for i, (a, b) in enumerate(spans)}
    return header(json.dumps(tensors), data)


def saved(change: Callable[[Tensors], Tensors]) -> Writer:
    """A safetensors file of what `change` makes of the checkpoint's tensors."""
    return lambda path, tensors: save_file({k: v.contiguous() for k, v in change(dict(tensors)).items()}, path)


def edited(change: Callable[[Tensors], Any]) -> Writer:
    """The checkpoint after `change` has edited its tensors in place."""

    def apply(tensors: Tensors) -> Tensors:
        change(tensors)
        return tensors

    return saved(apply)


def poisoned(key: str, value: float) -> Writer:
    """The checkpoint with one bad value."""

    def change(tensors: Tensors) -> None:
        tensors[key] = tensors[key].clone()
        tensors[key].view(-1)[-1] = value

    return edited(change)


def taesd(without: str = "none") -> Tensors:
    """A TAESD decoder of one level with three blocks, 8 channels wide, without the keys that start with `without`."""
    blocks = {f"{block}.conv.{i}": (8, 8, 3, 3) for block in (3, 4, 5) for i in (0, 2, 4)}
    shapes = {"1": (8, 4, 3, 3), **blocks, "6": (3, 8, 3, 3)}
    tensors = {f"{key}.weight": torch.zeros(shape) for key, shape in shapes.items()}
    tensors |= {f"{key}.bias": torch.zeros(shape[0]) for key, shape in shapes.items()}
    return {key: value for key, value in tensors.items() if not key.startswith(without)}


def sparse(length: int, size: int) -> Writer:
    """A header length in a file of that size, which takes no disk space."""

    def write(path: Path, _: Tensors) -> None:
        with path.open("wb") as file:
            file.write(length.to_bytes(8, "little"))
            file.truncate(size)

    return write


class Call:
    """Pickles to a call of a function, which unpickling would make."""

    def __init__(self, function: Any, *arguments: Any):
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


class OwnClass:
    """A class that no checkpoint refers to."""


def pickled(content: Any, protocol: int = 2) -> Writer:
    return lambda path, _: torch.save(content, path, pickle_protocol=protocol)


def bare_pickle(function: Any, text: str) -> Writer:
    """A pickle outside a zip that would call `function`; {} in the text becomes a file that must not be created."""
    return lambda path, _: path.write_bytes(pickle.dumps(Call(function, text.format(path.parent / "ran")), 2))


def calls(function: Any, text: str, protocol: int = 2) -> Writer:
    """A checkpoint that would call `function`; {} in the text becomes a file that must not be created."""
    return lambda path, _: torch.save(
        {"state_dict": Call(function, text.format(path.parent / "ran"))}, path, pickle_protocol=protocol
    )


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Writer:
    def write(path: Path, _: Tensors) -> None:
        with zipfile.ZipFile(path, "w", method) as archive:
            for name, data in members.items():
                archive.writestr(name, data)

    return write


def members_of(content: Any) -> dict[str, bytes]:
    """The zip members of what `torch.save` writes."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with zipfile.ZipFile(buffer) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def rewritten(change: Callable[[dict[str, bytes]], dict[str, bytes]], method: int = zipfile.ZIP_STORED) -> Writer:
    """A good .ckpt with changed zip members."""
    return lambda path, tensors: zipped(change(members_of({"state_dict": {"a": torch.ones(1000)}})), method)(
        path, tensors
    )


def with_pickle(data: bytes) -> Writer:
    """A .ckpt whose data.pkl is replaced."""
    return rewritten(lambda members: {k: data if k.endswith("data.pkl") else v for k, v in members.items()})


def encoding(codec: bytes, text: bytes = b"abc", times: int = 1) -> bytes:
    """A pickle of a list of texts encoded to bytes; `codec` is the opcode that pushes the codec's name."""
    pushed = b"X" + struct.pack("<I", len(text)) + text
    return b"\x80\x02]q\x00" + (b"c_codecs\nencode\n" + pushed + codec + b"\x86Ra") * times + b"."


def cut(part: float) -> Writer:
    """The beginning of a good .ckpt."""

    def write(path: Path, tensors: Tensors) -> None:
        torch.save({"state_dict": tensors}, path)
        os.truncate(path, int(path.stat().st_size * part))

    return write


def shared_bytes(path: Path, _: Tensors) -> None:
    """A zip whose directory lists one member's bytes under two names."""
    zipped({"archive/data.pkl": b"\x80\x02}.", "archive/data/0": bytes(64)})(path, {})
    data = bytearray(path.read_bytes())
    second = data.rindex(b"PK\x01\x02")
    struct.pack_into("<I", data, second + 42, 0)
    path.write_bytes(bytes(data))


def strided(shape: tuple[int, ...], strides: tuple[int, ...], offset: int = 0, claimed: int | None = None) -> Writer:
    """A tensor over 16 stored values with any shape and strides; its storage claims to hold `claimed` values."""

    class Storage:
        pass

    class StoragePickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            if isinstance(value, Storage):
                return ("storage", torch.FloatStorage, "0", "cpu", claimed or 16)
            return None

    class Rebuilt:
        def __reduce__(self) -> Any:
            arguments = (Storage(), offset, shape, strides, False, OrderedDict())
            return torch._utils._rebuild_tensor_v2, arguments  # type: ignore[attr-defined]

    def write(path: Path, _: Tensors) -> None:
        members = members_of({"state_dict": {"a": torch.arange(16.0)}})
        out = io.BytesIO()
        StoragePickler(out, protocol=2).dump({"state_dict": {"a": Rebuilt()}})
        name = next(key for key in members if key.endswith("data.pkl"))
        zipped({**members, name: out.getvalue()})(path, {})

    return write


def fifo(path: Path, _: Tensors) -> None:
    os.mkfifo(path)


def link_to_itself(path: Path, _: Tensors) -> None:
    path.symlink_to(path)
