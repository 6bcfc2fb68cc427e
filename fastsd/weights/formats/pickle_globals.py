"""The names a pickled checkpoint may refer to: the parts of tensors, and what training leaves beside them.

Nothing is imported for the names in the second group. A placeholder object replaces whatever they would build, which
is enough to read the original checkpoints: they hold numpy scalars and the states of PyTorch Lightning callbacks.
"""

from __future__ import annotations

import pickletools
from collections.abc import Iterable, Iterator
from typing import Any

import torch

GlobalName = tuple[str, str]  # module and name

# Every name that a pickle of tensors and plain values refers to.
TENSORS = {
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch.nn.parameter", "Parameter"),
    ("torch", "Size"),
    *(
        ("torch", f"{kind}Storage")
        for kind in ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
    ),
}
# Losses and scores as numpy scalars, under today's name and the older one.
_NUMPY = {
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
}
PARAMETER_DICT = ("torch.nn.modules.container", "ParameterDict")
_PLAIN = {("__builtin__", "set"), ("builtins", "set")}
_TRAINING_PACKAGES = ("pytorch_lightning.", "lightning.", "omegaconf.")  # callback states and configs
# How protocol 2 writes bytes: `_codecs.encode(text, "latin1")`.
ENCODE = ("_codecs", "encode")
MAX_ENCODED = 2**16  # characters in total; a numpy scalar has eight


class Placeholder:
    """Replaces an object that is never built: accepts any arguments and any state, and keeps nothing."""

    def __new__(cls, *_: Any, **__: Any) -> Placeholder:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any): ...

    def __setstate__(self, _: Any) -> None: ...


class ParameterTable(Placeholder):
    """Replaces a `torch.nn.ParameterDict`, in which the first trainers of textual inversions keep their vectors.

    Attributes:
        tensors: its parameters, by key.
    """

    tensors: dict[str, torch.Tensor]

    def __setstate__(self, state: Any) -> None:
        kept = state.get("_parameters") if isinstance(state, dict) else None
        table = kept if isinstance(kept, dict) else {}
        self.tensors = {key: value for key, value in table.items() if isinstance(value, torch.Tensor)}


def has_placeholder(name: GlobalName) -> bool:
    """Whether a `Placeholder` may replace what `name` refers to."""
    return name in (*_NUMPY, *_PLAIN, PARAMETER_DICT) or f"{name[0]}.".startswith(_TRAINING_PACKAGES)


def placeholders(names: Iterable[GlobalName]) -> list[Any]:
    """The placeholders for those of `names` that have one, in the form of `torch.serialization.safe_globals`."""
    return [
        (ParameterTable if name == PARAMETER_DICT else Placeholder, ".".join(name))
        for name in names
        if has_placeholder(name)
    ]


def global_names(raw: bytes) -> Iterator[GlobalName]:
    """Every name that a pickle would import. A name computed during unpickling yields a pair that is never allowed.

    Raises:
        ValueError and other errors of pickletools: not a pickle.
    """
    for opcode, argument, _ in pickletools.genops(raw):
        if opcode.name in ("GLOBAL", "INST"):
            module, _, name = str(argument).partition(" ")
            yield module, name
        elif opcode.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
            yield "a name", "computed during unpickling"


def encodes_bytes_only(raw: bytes) -> bool:
    """Whether each `_codecs.encode` is called at once, with a text and "latin1", and all texts together are short.

    Other codecs, or encoding its own results again, would let a small pickle fill the memory. So whenever the function
    reaches the stack, by name or from the memo, the next opcodes must be exactly those two texts and the call.
    """
    memo: dict[Any, Any] = {}
    expected: list[str] = []  # the opcodes that must come next
    pushed: Any = None
    encoded = 0
    for opcode, argument, _ in pickletools.genops(raw):
        name = opcode.name
        if "PUT" in name:
            memo[argument] = pushed
            continue
        if "GET" in name:
            pushed = memo.get(argument)
        elif name == "GLOBAL" and argument == " ".join(ENCODE):
            pushed = ENCODE
        elif "UNICODE" in name:
            pushed = argument
        else:
            pushed = None
        step = expected.pop(0) if expected else ""
        if step in ("TUPLE2", "REDUCE"):
            if name != step:
                return False
        elif step:
            if not isinstance(pushed, str) or (step == "latin1" and pushed != step):
                return False
            encoded += len(pushed)
        elif pushed is ENCODE:
            expected = ["text", "latin1", "TUPLE2", "REDUCE"]
        if name in ("DUP", "MEMOIZE") or encoded > MAX_ENCODED:
            return False
    return not expected
