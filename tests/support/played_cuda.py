"""CUDA's streams, graphs, workspaces and allocator, played on a machine without a GPU: what a capture asks of them.

The play keeps what PyTorch keeps: a current stream, the streams that have a cuBLAS workspace and the pool that it is
in, the pool that the allocator captures into.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch


class PlayedStream:
    """A stream, by its number; `events` of all streams are in the play's one list."""

    def __init__(self, play: PlayedCuda, number: int):
        self.play, self.number = play, number

    def wait_stream(self, other: PlayedStream) -> None:
        self.play.events.append(f"{self.number} waits for {other.number}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PlayedStream) and other.number == self.number

    def __hash__(self) -> int:
        return self.number


class PlayedCuda:
    """The state of the play, and its faults.

    Attributes:
        current: the current stream; the caller's is 0.
        events: waits and launches, in order.
        workspaces: the pool of each stream's cuBLAS workspace; 0 is the pool of everything outside graphs.
        capturing: the pool that the allocator captures into, or None.
        users: of each pool: graphs, and captures that did not end.
        faults: errors that the next calls raise, by the name of the call.
    """

    def __init__(self) -> None:
        self.current = PlayedStream(self, 0)
        self.events: list[str] = []
        self.streams = self.pools = 0
        self.workspaces: dict[int, int] = {}
        self.capturing: int | None = None
        self.users: dict[int, int] = {}
        self.faults: dict[str, list[Exception]] = {}

    def fail(self, name: str) -> None:
        if self.faults.get(name):
            raise self.faults[name].pop(0)

    def product(self) -> int:
        """A product on the current stream, as cuBLAS computes it; returns the pool of its workspace."""
        self.events.append(f"product on {self.current.number}")
        self.fail("product")
        return self.workspaces.setdefault(self.current.number, self.capturing or 0)

    def wait_for_device(self, *_: Any) -> None:
        if self.capturing is not None:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    def new_stream(self, *_: Any) -> PlayedStream:
        self.streams += 1
        return PlayedStream(self, self.streams)

    def new_pool(self) -> int:
        self.pools += 1
        return self.pools

    @contextlib.contextmanager
    def on_stream(self, stream: PlayedStream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def end_allocate(self, device: int, pool: int) -> None:
        if self.capturing != pool:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.capturing = None

    def release(self, device: int, pool: int) -> None:
        self.users[pool] -= 1


class PlayedGraph:
    """A CUDA graph. `play` is set by `install`."""

    play: PlayedCuda
    stream: PlayedStream | None = None

    def capture_begin(self, pool: int, capture_error_mode: str) -> None:
        play = self.play
        assert play.capturing is None, "a capture inside a capture"
        play.capturing = pool  # PyTorch tells its allocator first
        play.users[pool] = play.users.get(pool, 0) + 1
        play.fail("capture_begin")
        self.stream = play.current

    def capture_end(self) -> None:
        play = self.play
        if play.current != self.stream:
            raise RuntimeError("Capture must end on the same stream it began on.")
        play.fail("capture_end")
        play.capturing = None

    def reset(self) -> None:
        self.play.events.append("reset")

    def replay(self) -> None:
        self.play.events.append(f"replay on {self.play.current.number}")


def install(monkeypatch: pytest.MonkeyPatch) -> PlayedCuda:
    """Put a new play in the place of CUDA."""
    play = PlayedCuda()
    graph = type("Graph", (PlayedGraph,), {"play": play})
    on_device = lambda device: contextlib.nullcontext()  # noqa: E731
    functions = {
        "Stream": play.new_stream, "stream": play.on_stream, "current_stream": lambda *_: play.current,
        "CUDAGraph": graph, "graph_pool_handle": play.new_pool, "device": on_device, "current_device": lambda: 0,
        "synchronize": play.wait_for_device, "empty_cache": lambda: None,
    }  # fmt: skip
    for name, function in functions.items():
        monkeypatch.setattr(torch.cuda, name, function)
    inner = {
        "_cuda_clearCublasWorkspaces": play.workspaces.clear,
        "_cuda_endAllocateToPool": play.end_allocate,
        "_cuda_releasePool": play.release,
    }
    for name, function in inner.items():
        monkeypatch.setattr(torch._C, name, function, raising=False)
    return play
