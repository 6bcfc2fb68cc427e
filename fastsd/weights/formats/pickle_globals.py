"""What a pickled checkpoint may refer to: the parts of tensors; and, without effect, what training leaves beside them.

Nothing is imported for a name in the second list. An empty object stands in for whatever it would make, so that the
original checkpoints, which hold numpy's scalars and the states of PyTorch Lightning's callbacks, can be read.
"""

from __future__ import annotations

import pickletools
from collections.abc import Iterable, Iterator
from typing import Any

Name = tuple[str, str]  # module and name

# All that a pickle of tensors and plain values refers to.
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
# In today's and in older spelling: losses and scores as numpy's numbers, the states of callbacks, configs.
_NUMPY = {
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
}
_PLAIN = {("__builtin__", "set"), ("builtins", "set")}
_BESIDE = ("pytorch_lightning.", "lightning.", "omegaconf.")
# How protocol 2 writes bytes: `_codecs.encode(text, "latin1")`.
ENCODE = ("_codecs", "encode")
MAX_ENCODED = 2**16  # characters in all; a number of numpy's has eight


class StandIn:
    """Stands for an object that is not made: takes whatever it is given, and keeps nothing."""

    def __new__(cls, *_: Any, **__: Any) -> StandIn:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any): ...

    def __setstate__(self, _: Any) -> None: ...


def stands_in(name: Name) -> bool:
    """Whether a name is one that `StandIn` may take the place of."""
    return name in _NUMPY or name in _PLAIN or f"{name[0]}.".startswith(_BESIDE)


def stand_ins(names: Iterable[Name]) -> list[Any]:
    """Stand-ins for those of `names` that have one, as `torch.serialization.safe_globals` takes them."""
    return [(StandIn, ".".join(name)) for name in names if stands_in(name)]


def names(raw: bytes) -> Iterator[Name]:
    """Every module and name that a pickle would import; one that is put together while unpickling has none here.

    Raises:
        ValueError and others of pickletools: no pickle.
    """
    for opcode, argument, _ in pickletools.genops(raw):
        if opcode.name in ("GLOBAL", "INST"):
            module, _, name = str(argument).partition(" ")
            yield module, name
        elif opcode.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
            yield "a name", "made while unpickling"


def only_bytes_are_encoded(raw: bytes) -> bool:
    """Whether each `_codecs.encode` is called at once, with a text and "latin1", and all texts together are short.

    With other codecs, or with its own results, a small pickle could make it fill the memory. So what follows the
    function on its way to the stack, from its name or from the memo, must be those two texts and the call.
    """
    memo: dict[Any, Any] = {}
    wanted: list[str] = []  # what must come next
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
        step = wanted.pop(0) if wanted else ""
        if step in ("TUPLE2", "REDUCE"):
            if name != step:
                return False
        elif step:
            if not isinstance(pushed, str) or (step == "latin1" and pushed != step):
                return False
            encoded += len(pushed)
        elif pushed is ENCODE:
            wanted = ["text", "latin1", "TUPLE2", "REDUCE"]
        if name in ("DUP", "MEMOIZE") or encoded > MAX_ENCODED:
            return False
    return not wanted
