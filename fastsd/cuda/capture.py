"""Capturing work in CUDA graphs: one stream and one memory pool for all captures of a device."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

import torch

WARM_UP = 3  # calls before a capture: kernels are compiled and chosen, workspaces allocated
# What RuntimeErrors say of memory: of CUDA, of the CPU's allocator, of libraries. CUDA's allocator has its own error.
NO_MEMORY = ("out of memory", "allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")

T = TypeVar("T")

# Held during a capture, and by whoever waits for a whole device: while a stream is captured, CUDA refuses to wait for
# its device in any thread, and the capture is lost (CUDA programming guide, "Prohibited and Unhandled Operations").
alone = threading.RLock()


class Recorder(Protocol):
    """Turns a callable into one that repeats its work on the device."""

    def record(self, function: Callable[[], T]) -> Callable[[], T]:
        """Capture `function`, after calling it a few times. The replay returns the same tensors each time, with new
        contents."""
        ...

    def wait(self) -> None:
        """Return when the device has done everything: then a graph and its buffers may be dropped."""
        ...

    def free(self) -> None:
        """Release the memory of dropped graphs."""
        ...


class CudaRecorder:
    """CUDA graphs of one device, in one memory pool.

    All are captured on one stream: cuBLAS keeps a workspace for each stream that it has seen.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None

    def record(self, function: Callable[[], T], warm_up: Callable[[], Any] | None = None) -> Callable[[], T]:
        """See `Recorder.record`; with `warm_up` in the place of `function` before the capture."""
        with torch.cuda.device(self.device):
            self._stream = self._stream or torch.cuda.Stream()
            with _after_and_before(self._stream), torch.cuda.stream(self._stream):
                for _ in range(WARM_UP):
                    (warm_up or function)()
                with alone:
                    graph, outputs = self._capture(function)

        def replay() -> T:
            graph.replay()
            return outputs

        return replay

    def wait(self) -> None:
        with alone:
            torch.cuda.synchronize(self.device)

    def free(self) -> None:
        self._pool = None  # a pool lives as long as a graph in it
        with alone:
            torch.cuda.empty_cache()

    def _capture(self, function: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
        """The graph of one call, and its results. `torch.cuda.graph` would do, but if it fails to end a capture, the
        capture's stream stays the current one, and PyTorch's allocator goes on as if the capture did."""
        torch.cuda.synchronize()
        clear_workspaces()
        torch.cuda.empty_cache()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            # "thread_local": other threads' work on the device does not break the capture.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            outputs = function()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # the first error says why; this one only that there was one
                end_capture(graph, self._pool)
            raise
        else:
            end_capture(graph, self._pool)
        finally:
            clear_workspaces()
        return graph, outputs


def end_capture(graph: torch.cuda.CUDAGraph, pool: Any) -> None:
    """End a capture into a pool, for the allocator too."""
    try:
        graph.capture_end()
    except BaseException:
        index = torch.cuda.current_device()
        with contextlib.suppress(RuntimeError, AttributeError):
            torch._C._cuda_endAllocateToPool(index, pool)  # raises where the allocator knows already
            torch._C._cuda_releasePool(index, pool)
        raise


@contextlib.contextmanager
def _after_and_before(stream: torch.cuda.Stream) -> Iterator[None]:
    """What runs on `stream` inside this context follows what the caller's stream has, and precedes what it gets next,
    after an error too."""
    own = torch.cuda.current_stream()
    stream.wait_stream(own)
    try:
        yield
    finally:
        own.wait_stream(stream)


def clear_workspaces() -> None:
    """Make cuBLAS forget its workspaces.

    Before a capture, so that a product in it gets a workspace in the graph's pool, which nothing else may use. After
    it, so that no product outside a graph gets that one. `torch.compile` clears them likewise, at times of its own, and
    thereby gives away the memory of one that was there before a capture.
    """
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if clear is not None:
        clear()


def ran_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it followed from, says that memory ran out."""
    seen: list[BaseException] = []
    waiting = [error]
    while waiting:
        one = waiting.pop()
        if one is None or one in seen:
            continue
        if isinstance(one, torch.OutOfMemoryError | MemoryError):
            return True
        if isinstance(one, RuntimeError) and any(text in str(one) for text in NO_MEMORY):
            return True
        seen.append(one)
        waiting += [one.__cause__, one.__context__]
    return False
