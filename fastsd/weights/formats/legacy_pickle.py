"""Reading tensors from files that `torch.save` wrote before PyTorch 1.6, as many upscalers still are.

Five pickles stand one after the other: a number, a version, the sizes of C's types, the content, and the names of its
storages; the storages' bytes follow, each after the count of its numbers. The pickles are not unpickled: a reader of
its own goes through their opcodes, and knows no more of them than tensors and plain values need. Nothing is imported
or called, and the memory is bounded by the count of opcodes.
"""

from __future__ import annotations

import io
import pickletools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastsd.errors import FastsdError
from fastsd.weights.formats.pickle_globals import TENSORS, GlobalName, has_placeholder

MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # the first pickle: 0x1950a86a20f9469cfc6c
VERSION = 1001
MAX_PICKLES, MAX_OPCODES = 16 * 2**20, 10**6  # bytes and opcodes of all five; checkpoints have some ten thousand
_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
# Opcodes whose argument is the value, and those that make a value of nothing.
_VALUES = frozenset(
    "BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINSTRING SHORT_BINSTRING BININT BININT1 BININT2 LONG1 BINFLOAT".split()
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MARK = object()


@dataclass(frozen=True)
class LegacyTensor:
    """A tensor: the name of its storage, where in it it begins, counted in numbers, its shape and its strides."""

    storage: str
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: torch.dtype
    count: int


def is_legacy(path: Path) -> bool:
    """Whether a file begins as those of torch.save before PyTorch 1.6."""
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def open_legacy(path: Path) -> tuple[Any, dict[str, tuple[int, int]]]:
    """The content, with `LegacyTensor`s in it, and where each storage's bytes are: start and length.

    Raises:
        FastsdError: malformed, cut short, or more than tensors and plain values.
    """
    size, places = path.stat().st_size, dict[str, tuple[int, int]]()
    with open(path, "rb") as file:
        reader = _Reader(path, file.read(MAX_PICKLES))
        try:
            _, version, machine, content, keys = (reader.value() for _ in range(5))
        except FastsdError:
            raise
        except Exception as error:  # opcodes that do not fit together fail in every way
            raise FastsdError(
                "an old file of torch.save that is damaged or cut short; download it again", path=path
            ) from error
        if version != VERSION or not isinstance(machine, dict) or machine.get("little_endian") is not True:
            raise FastsdError("an old file of torch.save in a form that fastsd does not read", path=path)
        position = reader.stream.tell()
        for key in keys if isinstance(keys, list) else ():
            file.seek(position)
            storage = reader.storages.get(str(key))
            if storage is None or int.from_bytes(file.read(8), "little") != storage.count:
                raise FastsdError(f"refused: its storage {str(key)[:40]!r} is not as long as it says", path=path)
            places[storage.key] = position + 8, storage.count * storage.dtype.itemsize
            position += 8 + places[storage.key][1]
            if position > size:
                raise FastsdError("an old file of torch.save that is cut short; download it again", path=path)
    return content, places


class _Reader:
    """Values out of pickles of tensors and plain values."""

    def __init__(self, path: Path, data: bytes):
        self.path, self.stream = path, io.BytesIO(data)
        self.storages: dict[str, _Storage] = {}
        self._left = MAX_OPCODES

    def value(self) -> Any:
        """The next pickle's."""
        stack: list[Any] = []
        memo: dict[Any, Any] = {}
        for opcode, argument, _ in pickletools.genops(self.stream):
            name, self._left = opcode.name, self._left - 1
            if self._left < 0:
                raise FastsdError("refused: no checkpoint has that many parts", path=self.path)
            if name == "STOP":
                return stack.pop()
            if name in _VALUES:
                stack.append(argument)
            elif name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            elif name in ("BINPUT", "LONG_BINPUT"):
                memo[argument] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif name in _TUPLES:
                split = len(stack) - _TUPLES[name]
                stack[split:] = [tuple(stack[split:])]
            elif name in ("MARK", "EMPTY_DICT", "EMPTY_LIST"):
                stack.append({"MARK": _MARK, "EMPTY_DICT": {}, "EMPTY_LIST": []}[name])
            elif name != "PROTO":
                self._combine(name, argument, stack)
        raise ValueError("no end")

    def _combine(self, name: str, argument: Any, stack: list[Any]) -> None:
        """Opcodes that make something of what is on the stack."""
        if name == "GLOBAL":
            stack.append(self._known(argument))
        elif name in ("REDUCE", "BUILD"):  # BUILD gives an object a state, such as versions beside a state dict
            last = stack.pop()
            if name == "REDUCE":
                stack.append(self._rebuilt(stack.pop(), last))
        elif name == "BINPERSID":
            stack.append(self._storage(stack.pop()))
        elif name in ("APPEND", "SETITEM"):
            items = [stack.pop() for _ in range(1 if name == "APPEND" else 2)][::-1]
            self._fill(stack[-1], items)
        elif name in ("APPENDS", "SETITEMS", "TUPLE"):
            items = []
            while (item := stack.pop()) is not _MARK:
                items.append(item)
            items.reverse()
            if name == "TUPLE":
                stack.append(tuple(items))
            else:
                self._fill(stack[-1], items)
        else:
            raise FastsdError(f"refused: it holds more than tensors and plain values ({name})", path=self.path)

    @staticmethod
    def _fill(target: Any, items: list[Any]) -> None:
        if isinstance(target, list):
            target += items
        elif isinstance(target, dict):
            target.update(zip(items[::2], items[1::2], strict=True))

    def _known(self, argument: str) -> GlobalName:
        """A name that the content refers to, if it may."""
        module, _, name = argument.partition(" ")
        if (module, name) not in TENSORS and not has_placeholder((module, name)):
            raise FastsdError(f"refused: it refers to {module}.{name}"[:160] + ", not only to tensors", path=self.path)
        return module, name

    def _rebuilt(self, name: GlobalName, arguments: tuple[Any, ...]) -> Any:
        """What a call would make; None of what is no tensor, table or size."""
        match name:
            case ("torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2"):
                storage, offset, shape, strides = arguments[:4]
                numbers = (offset, *shape, *strides)
                if (
                    not isinstance(storage, _Storage)
                    or len(shape) != len(strides)
                    or not all(type(n) is int and 0 <= n < 2**48 for n in numbers)
                ):
                    raise ValueError("no tensor")
                return LegacyTensor(storage.key, storage.dtype, offset, tuple(shape), tuple(strides))
            case ("torch._utils", "_rebuild_parameter") | ("torch.nn.parameter", "Parameter") | ("torch", "Size"):
                return arguments[0]
            case ("collections", "OrderedDict"):
                return dict(arguments[0]) if arguments else {}
        return None

    def _storage(self, argument: Any) -> _Storage:
        kind, (_, type_name), key, _, count, view = argument
        if kind != "storage" or view is not None or type(count) is not int or not 0 <= count < 2**48:
            raise ValueError("no storage")
        storage = _Storage(str(key), _DTYPES[type_name], count)
        if self.storages.setdefault(storage.key, storage) != storage:
            raise ValueError("two storages of one name")
        return storage
