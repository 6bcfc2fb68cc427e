"""The memory of a dry run: sizes and lifetimes of its storages, as PyTorch's caching allocator would count them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch

ROUND = 512  # bytes: the smallest block (c10/cuda/CUDACachingAllocator, kMinBlockSize)


class Allocations:
    """Follows storages from their first tensor to the death of their last."""

    def __init__(self) -> None:
        self._live: dict[int, weakref.ref] = {}
        self.now = self.peak = 0  # bytes

    def see(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count the storages of these tensors, where they are new."""
        for x in tensors:
            storage = x.untyped_storage()
            key = storage._cdata
            if key in self._live or storage.nbytes() == 0:
                continue
            size = -(-storage.nbytes() // ROUND) * ROUND

            def freed(_: object, key: int = key, size: int = size) -> None:
                del self._live[key]
                self.now -= size

            self._live[key] = weakref.ref(storage, freed)
            self.now += size
            self.peak = max(self.peak, self.now)
