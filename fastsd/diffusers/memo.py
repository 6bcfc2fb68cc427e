"""The last result of a function, kept while its inputs are the very same tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class Memo(Generic[T]):
    """A pipeline gives its networks the same text and the same images in every step."""

    def __init__(self) -> None:
        self._inputs: tuple[tuple[weakref.ref[torch.Tensor], int], ...] = ()
        self._stamp: object = None
        self._result: T | None = None

    def __call__(self, inputs: tuple[torch.Tensor, ...], stamp: object, compute: Callable[[], T]) -> T:
        """`compute()`, or its last result.

        Args:
            inputs: what it reads; changed in place, they are others. A tensor made in inference mode does not tell.
            stamp: equal as long as all else that it reads is the same.
        """
        if any(x.is_inference() for x in inputs):
            return compute()
        same = len(inputs) == len(self._inputs) and stamp == self._stamp
        if self._result is not None and same:
            if all(ref() is x and x._version == version for x, (ref, version) in zip(inputs, self._inputs)):
                return self._result
        self._result = compute()
        self._inputs, self._stamp = tuple((weakref.ref(x), x._version) for x in inputs), stamp
        return self._result
