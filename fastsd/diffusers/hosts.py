"""A host's class with our answer to its calls before its own; the host stays the object that it was."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import nn

from fastsd.diffusers.twin import Twin

ATTRIBUTE = "_fastsd_twin"


class Accelerated:
    """What an accelerated module is, before its own class.

    A copy, or what is pickled, is the plain module.
    """

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = {name: value for name, value in self.__dict__.items() if name != ATTRIBUTE}
        return object.__new__, (type(self).__mro__[2],), state


class EqualToOwn(type):
    """The type of accelerated classes: one is equal to its host's own class, which `from_pipe` looks for by `==`."""

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is cls.__mro__[2]

    def __hash__(cls) -> int:
        return hash(cls.__mro__[2])


@functools.cache
def _accelerated_class(own: Any) -> type:
    signature = inspect.signature(own.forward)

    @functools.wraps(own.forward)
    def forward(self: Any, *arguments: Any, **named: Any) -> Any:
        def call() -> Any:
            return own.forward(self, *arguments, **named)

        try:
            bound = signature.bind(self, *arguments, **named)
        except TypeError:
            return call()  # which says what is wrong
        bound.apply_defaults()
        given = dict(list(bound.arguments.items())[1:])
        return self.__dict__[ATTRIBUTE].answer(given, call)

    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    return EqualToOwn(own.__name__, (Accelerated, own), {**names, "forward": forward})


def twin_of(module: Any) -> Twin | None:
    """What answers the calls of a module; None: it is not accelerated."""
    return module.__dict__.get(ATTRIBUTE) if isinstance(module, nn.Module) else None


def attach(twin: Twin) -> None:
    """Let `twin` answer the calls of its host."""
    twin.host.__dict__[ATTRIBUTE] = twin
    own: Any = type(twin.host)
    twin.host.__class__ = _accelerated_class(own)


def detach(module: nn.Module) -> None:
    """Give a module its own code and weights back."""
    twin: Twin = module.__dict__.pop(ATTRIBUTE)
    module.__class__ = type(module).__mro__[2]
    twin.end()
