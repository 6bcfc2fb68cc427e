"""The memory of a dry run: sizes and lifetimes of its storages, as PyTorch's caching allocator would hold them.

The allocator (c10/cuda/CUDACachingAllocator.cpp) rounds a request to 512 bytes and takes the smallest free block of its
pool that fits; without one it asks the driver for a segment. Requests of up to 1 MiB come from segments of 2 MiB, those
of less than 10 MiB from segments of 20 MiB, larger ones from segments of their own, rounded to 2 MiB. What is left of a
block stays a free block, of a large segment only if it exceeds 1 MiB. Neighbours that are free become one. Each stream
and each pool of graphs has blocks of its own. The workspaces of cuBLAS and cuDNN are not modelled.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

MIB = 2**20
ROUND = 512
SMALL = MIB
SMALL_SEGMENT, LARGE_SEGMENT, ROUND_LARGE = 2 * MIB, 20 * MIB, 2 * MIB
LARGE = 10 * MIB

MAIN, EAGER, GRAPHS = "main", "warm-up", "graphs"  # the pools: a stream each, and the graphs'


@dataclass(eq=False)
class Block:
    """A part of a segment."""

    size: int
    small: bool
    pool: str
    free: bool = True
    before: Block | None = field(default=None, repr=False)
    after: Block | None = field(default=None, repr=False)


class Allocations:
    """Follows storages from their first tensor to the death of their last.

    Attributes:
        live, peak: bytes of storages, rounded; `torch.cuda.max_memory_allocated` would say `peak`.
        reserved: bytes of segments, which are never given back; `torch.cuda.max_memory_reserved`.
    """

    def __init__(self) -> None:
        self.live = self.peak = self.reserved = 0
        self._known: dict[int, weakref.ref] = {}
        self._free: set[Block] = set()
        self._pool = MAIN

    @contextmanager
    def pool(self, name: str) -> Iterator[None]:
        """Inside this context memory comes from that pool."""
        before, self._pool = self._pool, name
        try:
            yield
        finally:
            self._pool = before

    def see(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count the storages of these tensors, where they are new."""
        for x in tensors:
            storage = x.untyped_storage()
            key = storage._cdata
            if key in self._known or storage.nbytes() == 0:
                continue
            block = self.allocate(storage.nbytes())

            def freed(_: object, key: int = key, block: Block = block) -> None:
                del self._known[key]
                self.release(block)

            self._known[key] = weakref.ref(storage, freed)

    def allocate(self, size: int) -> Block:
        """A block of at least `size` bytes."""
        size = -(-size // ROUND) * ROUND
        small = size <= SMALL
        fitting = [b for b in self._free if b.pool == self._pool and b.small == small and b.size >= size]
        block = min(fitting, key=lambda b: b.size) if fitting else self._segment(size, small)
        self._free.discard(block)
        block.free = False
        rest = block.size - size
        if rest >= ROUND if small else rest > SMALL:
            left = Block(rest, small, self._pool, before=block, after=block.after)
            if block.after is not None:
                block.after.before = left
            block.after, block.size = left, size
            self._free.add(left)
        self.live += block.size
        self.peak = max(self.peak, self.live)
        return block

    def _segment(self, size: int, small: bool) -> Block:
        own = -(-size // ROUND_LARGE) * ROUND_LARGE
        segment = SMALL_SEGMENT if small else LARGE_SEGMENT if size < LARGE else own
        self.reserved += segment
        return Block(segment, small, self._pool)

    def release(self, block: Block) -> None:
        """Free a block, and join it with its neighbours that are free."""
        self.live -= block.size
        block.free = True
        for other in (block.before, block.after):
            if other is None or not other.free:
                continue
            self._free.discard(other)
            block.size += other.size
            if other is block.before:
                block.before = other.before
                if block.before is not None:
                    block.before.after = block
            else:
                block.after = other.after
                if block.after is not None:
                    block.after.before = block
        self._free.add(block)
