"""Callables captured once in CUDA graphs and replayed; who calls them cannot tell.

A captured graph repeats the same launches on the same memory with the same numbers from the host. So everything that
may differ between two calls is a tensor in a static buffer, and every shape has a graph of its own. Graphs share one
memory pool: they never run at the same time, and each result is copied out before another one may run.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from fastsd.kernels import dispatch

WARM_UP = 3  # calls before a capture: kernels are compiled and chosen, workspaces taken
MAX_GRAPHS = 16  # a resolution takes about four: text, step, decoder, and encoder with a picture

T = TypeVar("T")


class Recorder(Protocol):
    """Turns a callable into one that repeats its work on the device."""

    def record(self, function: Callable[[], T]) -> Callable[[], T]:
        """Capture `function`, which may be called several times before. What comes back gives the same tensors each
        time, with new contents."""
        ...

    def free(self) -> None:
        """Give back the memory of graphs that are gone."""
        ...


class CudaRecorder:
    """CUDA graphs of one device, in one memory pool."""

    def __init__(self, device: torch.device):
        self.device = device
        self._pool: Any = None

    def record(self, function: Callable[[], T]) -> Callable[[], T]:
        with torch.cuda.device(self.device):
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    function()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # "thread_local": what other threads do on the device does not break the capture.
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                outputs = function()
            torch.cuda.current_stream().wait_stream(stream)

        def replay() -> T:
            graph.replay()
            return outputs

        return replay

    def free(self) -> None:
        self._pool = None  # a pool lives as long as a graph in it
        torch.cuda.empty_cache()


@dataclass
class Captured:
    """A callable on static buffers, which whoever replays it fills first."""

    buffers: Any
    replay: Callable[[], Any]


class Graphs:
    """The graphs of one pipeline, the least recently used of which goes when there are too many."""

    def __init__(self, recorder: Recorder | None = None, max_graphs: int = MAX_GRAPHS):
        """recorder: None runs everything eagerly."""
        self.recorder, self.max_graphs = recorder, max_graphs
        self._captured: OrderedDict[Hashable, Captured] = OrderedDict()
        self._failed: set[Hashable] = set()
        self._warned = False
        self._stream: torch.cuda.Stream | None = None  # of the last turn

    def __len__(self) -> int:
        return len(self._captured)

    @property
    def active(self) -> bool:
        """Whether anything is captured."""
        return self.recorder is not None and self.max_graphs > 0

    def __call__(self, name: Hashable, function: Callable[..., T], *inputs: torch.Tensor, weights: nn.Module) -> T:
        """`function(*inputs)`, from a graph where there is one for these shapes.

        Args:
            name: of the function: two calls with one name must be calls of the same function.
            function: tensors to a tensor or a named tuple of tensors; it may depend on nothing else that changes,
                except weights that are changed in place.
            weights: the module whose they are; once others take their place, the function is captured anew.

        Returns:
            Fresh tensors.
        """
        if not self.active:
            return function(*inputs)
        key = (name, circumstances(weights), *((tuple(x.shape), x.dtype) for x in inputs))

        def make() -> tuple[Any, Callable[[], T]]:
            buffers = tuple(torch.empty_like(x).copy_(x) for x in inputs)
            return buffers, lambda: function(*buffers)

        captured = self.captured(key, make)
        if captured is None:
            return function(*inputs)
        for buffer, x in zip(captured.buffers, inputs, strict=True):
            buffer.copy_(x)
        return _clone(captured.replay())

    def captured(self, key: Hashable, make: Callable[[], tuple[Any, Callable[[], Any]]]) -> Captured | None:
        """The capture for `key`; None where callables run eagerly.

        Args:
            make: gives the static buffers and the callable on them, when the capture has to be made.
        """
        if self.recorder is None or not self.active or key in self._failed:
            return None
        found = self._captured.get(key)
        if found is None:
            while len(self._captured) >= self.max_graphs:
                self._captured.popitem(last=False)
            found = self._capture(self.recorder, key, make)
            if found is None:
                return None
            self._captured[key] = found
        self._captured.move_to_end(key)
        return found

    def in_order(self, device: torch.device) -> None:
        """Let what is launched from here on wait for what was launched before, on whatever stream that was.

        Callers take turns on the host; on streams of their own (one for each thread, say) their work on the buffers
        could overlap all the same.
        """
        if device.type != "cuda" or not self.active:
            return
        stream = torch.cuda.current_stream(device)
        if self._stream is not None and self._stream != stream:
            stream.wait_stream(self._stream)
        self._stream = stream

    def forget(self) -> None:
        """Drop every graph, for the memory that they hold; what could not be captured may be tried again."""
        self._captured.clear()
        self._failed.clear()
        if self.recorder is not None:
            self.recorder.free()

    def _capture(
        self, recorder: Recorder, key: Hashable, make: Callable[[], tuple[Any, Callable[[], Any]]]
    ) -> Captured | None:
        """Capture; with too little memory once more without the other graphs; else run eagerly and say why."""
        try:
            return _record(recorder, make)
        except torch.OutOfMemoryError:
            self.forget()
        except Exception as error:
            self._give_up(key, error)
            return None
        try:
            return _record(recorder, make)
        except Exception as error:
            self.forget()
            self._give_up(key, error)
            return None

    def _give_up(self, key: Hashable, error: Exception) -> None:
        self._failed.add(key)
        if not self._warned:
            self._warned = True
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            warnings.warn(f"fastsd runs without CUDA graphs, slower: the capture failed ({reason})", stacklevel=2)


def circumstances(weights: nn.Module) -> Hashable:
    """What a graph depends on beside its inputs: where the weights are, and a backend that this thread is forced to.

    A packed weight tells no address; its identity stands for it.
    """
    return dispatch.forced_name(), *(id(p) if p.is_mkldnn else p.data_ptr() for p in weights.parameters())


def _record(recorder: Recorder, make: Callable[[], tuple[Any, Callable[[], Any]]]) -> Captured:
    buffers, function = make()
    return Captured(buffers, recorder.record(function))


def _clone(result: Any) -> Any:
    """Fresh tensors for a tensor, or a tuple of them in its own class."""
    if isinstance(result, torch.Tensor):
        return result.clone()
    parts = [_clone(part) for part in result]
    return type(result)(*parts) if hasattr(result, "_fields") else type(result)(parts)


@contextmanager
def chosen_convolutions(device: torch.device) -> Iterator[None]:
    """Inside this context cuDNN measures its algorithms at a shape's first call, and keeps to those whose sums have a
    fixed order; with graphs and without, so that both compute the same. The switches are the whole process's."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    if device.type == "cuda":
        cudnn.benchmark, cudnn.deterministic = True, True
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before
