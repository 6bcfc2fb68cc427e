"""Callables captured once in CUDA graphs and replayed; their callers cannot tell.

A captured graph repeats the same launches on the same memory with the same numbers from the host. So everything that
may differ between two calls is a tensor in a static buffer, and every shape has a graph of its own. Graphs share one
memory pool: they never run at the same time, and each result is copied out before the next may run.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from fastsd.cuda.capture import Recorder, ran_out_of_memory
from fastsd.kernels import dispatch

log = logging.getLogger(__name__)

MAX_GRAPHS = 16  # a resolution takes about four: text, step, decoder, and with an image the encoder

T = TypeVar("T")


class Capturable(Protocol):
    """Work on static buffers of its own, which a graph can capture."""

    def run(self) -> Any:
        """Do it; the result is a tensor or a tuple of tensors."""
        ...


@dataclass
class Captured:
    """Captured work. Its buffers are filled before each replay."""

    work: Any
    replay: Callable[[], Any]


class FunctionOnBuffers:
    """A function of tensors, called on copies of its first inputs."""

    def __init__(self, function: Callable[..., Any], inputs: tuple[torch.Tensor, ...]):
        self.function = function
        self.buffers = tuple(torch.empty_like(x).copy_(x) for x in inputs)

    def run(self) -> Any:
        return self.function(*self.buffers)

    def load(self, inputs: tuple[torch.Tensor, ...]) -> None:
        """Fill the buffers."""
        for buffer, x in zip(self.buffers, inputs, strict=True):
            buffer.copy_(x)


class Graphs:
    """The graphs of one pipeline. When there are too many, the least recently used is dropped."""

    def __init__(self, recorder: Recorder | None = None, max_graphs: int = MAX_GRAPHS):
        """recorder: None runs everything eagerly."""
        self.recorder, self.max_graphs = recorder, max_graphs
        self._captured: OrderedDict[Hashable, Captured] = OrderedDict()
        self._failed: set[Hashable] = set()
        self._warned = False
        self._stream: torch.cuda.Stream | None = None  # that the last caller launched on

    def __len__(self) -> int:
        return len(self._captured)

    @property
    def active(self) -> bool:
        """Whether callables are captured at all."""
        return self.recorder is not None and self.max_graphs > 0

    def __call__(self, name: Hashable, function: Callable[..., T], *inputs: torch.Tensor, weights: nn.Module) -> T:
        """`function(*inputs)`, from a graph where there is one for these shapes.

        Args:
            name: of the function: calls with equal names must be calls of the same function.
            function: tensors to a tensor or a named tuple of tensors. Besides its inputs it may depend only on
                weights, which may change in place.
            weights: the module that holds them; once other tensors replace them, the function is captured again.

        Returns:
            Fresh tensors.
        """
        if not self.active:
            return function(*inputs)
        key = (name, graph_key(weights), *((tuple(x.shape), x.dtype) for x in inputs))
        captured = self.captured(key, lambda: FunctionOnBuffers(function, inputs))
        if captured is None:
            return self.eagerly(lambda: function(*inputs))
        captured.work.load(inputs)
        return _clone(captured.replay())

    def eagerly(self, function: Callable[[], T]) -> T:
        """`function()`, which changes nothing. Where memory runs out, again without the graphs, which hold some."""
        try:
            return function()
        except Exception as error:
            if not self._captured or not ran_out_of_memory(error):
                raise
        self._drop()
        return function()

    def captured(self, key: Hashable, make: Callable[[], Capturable]) -> Captured | None:
        """The captured work for `key`; None where callables run eagerly.

        Args:
            make: makes the work where it is not captured yet.
        """
        if self.recorder is None or not self.active or key in self._failed:
            return None
        found = self._captured.get(key)
        if found is None:
            if len(self._captured) >= self.max_graphs:
                self.recorder.wait()
            while len(self._captured) >= self.max_graphs:
                self._captured.popitem(last=False)
            found = self._capture(self.recorder, key, make)
            if found is None:
                return None
            self._captured[key] = found
        self._captured.move_to_end(key)
        return found

    def in_order(self, device: torch.device) -> None:
        """Let later launches wait for earlier ones, whatever their streams.

        Callers take turns on the host. On different streams (one for each thread, say) their work on the buffers could
        still overlap.
        """
        if device.type != "cuda":
            return
        stream = torch.cuda.current_stream(device)
        if self._stream is not None and self._stream != stream:
            stream.wait_stream(self._stream)
        self._stream = stream

    def forget(self) -> None:
        """Drop every graph and release its memory. Failed captures may be tried again."""
        self._failed.clear()
        self._drop()

    def _drop(self) -> None:
        if self.recorder is not None:
            self.recorder.wait()
            self._captured.clear()
            self.recorder.free()

    def _capture(self, recorder: Recorder, key: Hashable, make: Callable[[], Capturable]) -> Captured | None:
        """Capture, and once more if it fails: out of memory, without the other graphs; else because another thread
        that waits for the whole device breaks a capture. After the second failure warn, and run eagerly."""
        found, reason, short_of_memory = _try_to_record(recorder, make)
        if found is None:
            if short_of_memory:
                self._drop()
            found, reason, short_of_memory = _try_to_record(recorder, make)
        if found is None:
            if short_of_memory:
                self._drop()
            self._give_up(key, reason)
        return found

    def _give_up(self, key: Hashable, reason: str) -> None:
        self._failed.add(key)
        if not self._warned:
            self._warned = True
            log.warning("fastsd runs without CUDA graphs, slower: the capture failed (%s)", reason)


def graph_key(weights: nn.Module) -> Hashable:
    """What a graph depends on besides its inputs: the addresses of the weights, and a backend forced on this thread.

    A packed weight has no address; its identity stands for it.
    """
    return dispatch.forced_name(), *(id(p) if p.is_mkldnn else p.data_ptr() for p in weights.parameters())


def _try_to_record(recorder: Recorder, make: Callable[[], Capturable]) -> tuple[Captured | None, str, bool]:
    """The captured work; or why there is none, and whether that is for want of memory.

    Returns no error: its traceback would hold the tensors of every function that it passed, while memory is needed.
    """
    try:
        work = make()
        return Captured(work, recorder.record(work.run)), "", False
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        return None, reason, ran_out_of_memory(error)


def _clone(result: Any) -> Any:
    """A copy of a tensor, or of a (named) tuple of tensors."""
    if isinstance(result, torch.Tensor):
        return result.clone()
    parts = [_clone(part) for part in result]
    return type(result)(*parts) if hasattr(result, "_fields") else type(result)(parts)
