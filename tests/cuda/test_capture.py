"""Captures that fail, and what a capture leaves behind, with CUDA played (tests/support/played_cuda.py)."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastsd.cuda.capture import WARM_UP, CudaRecorder, clear_workspaces, ran_out_of_memory
from fastsd.graph import Graphs
from tests.support.played_cuda import PlayedCuda, install
from tests.support.tape import TapeRecorder
from tests.support.told import told

DEVICE = torch.device("cuda", 0)


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> PlayedCuda:
    return install(monkeypatch)


class Work:
    """What `Graphs.captured` takes."""

    def __init__(self, run: Callable[[], Any]):
        self.run = run


def test_a_capture_is_between_the_callers_work_and_what_follows(play: PlayedCuda) -> None:
    replay = CudaRecorder(DEVICE).record(play.product)
    replay()
    assert play.events == ["1 waits for 0", *["product on 1"] * (WARM_UP + 1), "0 waits for 1", "replay on 0"]


@pytest.mark.parametrize("fault", ["capture_begin", "capture_end", "product"])
def test_after_a_capture_that_fails_everything_is_as_before(play: PlayedCuda, fault: str) -> None:
    """`torch.cuda.graph` would leave the capture's stream current: the eager run would go there, unordered."""
    error = RuntimeError("operation failed due to a previous error during capture")
    with pytest.raises(RuntimeError) as caught:
        play.faults[fault] = [error]
        CudaRecorder(DEVICE).record(play.product)
    assert caught.value is error
    assert play.current.number == 0 and play.capturing is None and not play.workspaces
    assert not any(play.users.values()) and play.events[-1] == "0 waits for 1"


def test_the_first_error_is_told_not_that_the_capture_could_not_end(play: PlayedCuda) -> None:
    recorder, calls = CudaRecorder(DEVICE), []

    def runs_out_in_the_capture() -> None:
        calls.append(play.product())
        if len(calls) == WARM_UP + 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    play.faults["capture_end"] = [RuntimeError("operation failed due to a previous error during capture")]
    with pytest.raises(torch.OutOfMemoryError):
        recorder.record(runs_out_in_the_capture)
    assert play.current.number == 0 and play.capturing is None and not any(play.users.values())


def test_an_interrupt_ends_the_capture(play: PlayedCuda) -> None:
    calls = []

    def interrupted() -> None:
        calls.append(play.product())
        if len(calls) == WARM_UP + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        CudaRecorder(DEVICE).record(interrupted)
    assert play.current.number == 0 and play.capturing is None


def test_two_threads_capture_one_after_the_other(play: PlayedCuda) -> None:
    """While a stream is captured, nobody may wait for the device; the second waits with that, too."""
    inside, second_waits = threading.Event(), threading.Event()
    first, second = CudaRecorder(DEVICE), CudaRecorder(DEVICE)
    done: list[str] = []

    def slow() -> None:
        play.product()
        if play.capturing is not None and not inside.is_set():
            inside.set()
            second_waits.wait(0.3)

    def other() -> None:
        inside.wait(10)
        try:
            second.wait()
            second_waits.set()
            done.append("waited")
        except RuntimeError as error:
            done.append(str(error))

    thread = threading.Thread(target=other)
    thread.start()
    first.record(slow)
    thread.join()
    assert done == ["waited"]


def test_one_stream_serves_all_captures_of_a_recorder(play: PlayedCuda) -> None:
    recorder = CudaRecorder(DEVICE)
    for _ in range(3):
        recorder.record(play.product)
    assert play.streams == play.pools == 1


def test_a_captured_product_has_its_workspace_in_the_graphs_pool(play: PlayedCuda) -> None:
    """Else it is memory that anyone gets who asks after cuBLAS forgot it, as inside `torch.compile`."""
    recorder, pools = CudaRecorder(DEVICE), []
    for _ in range(2):
        recorder.record(lambda: pools.append(play.product()))
    assert pools == [*[0] * WARM_UP, 1] * 2
    assert not play.workspaces  # and no product outside has one there


def test_a_torch_that_cannot_forget_workspaces_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C, "_cuda_clearCublasWorkspaces", raising=False)
    clear_workspaces()


def chained(first: Exception, last: Exception, cause: bool) -> Exception:
    """`last`, raised from `first` or while it was handled."""
    try:
        try:
            raise first
        except Exception:
            if cause:
                raise last from first
            raise last  # noqa: B904
    except Exception as error:
        return error


@pytest.mark.parametrize("cause", [True, False])
@pytest.mark.parametrize(
    "first",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
    ids=str,
)
def test_out_of_memory_is_recognised_behind_other_errors(first: Exception, cause: bool) -> None:
    assert ran_out_of_memory(first)
    assert ran_out_of_memory(chained(first, RuntimeError("operation failed due to a previous error"), cause))


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    circle = RuntimeError("a circle")
    circle.__cause__ = circle
    for error in (RuntimeError("illegal memory access"), ValueError("out of memory"), circle, None):
        assert not ran_out_of_memory(error)


def test_what_ran_out_of_memory_is_freed_before_the_second_try() -> None:
    """The error's traceback holds every tensor of the functions that it passed, and reaches the retry disguised."""
    held: list[Any] = []

    class Freed(TapeRecorder):
        def free(self) -> None:
            super().free()
            assert all(one() is None for one in held)

    def run() -> torch.Tensor:
        activation = torch.ones(1000)
        held.append(weakref.ref(activation))
        if len(held) == 1:
            try:
                raise torch.OutOfMemoryError("CUDA out of memory")
            except torch.OutOfMemoryError as error:
                raise RuntimeError("operation failed due to a previous error during capture") from error
        return activation

    recorder = Freed()
    graphs = Graphs(recorder)
    found = graphs.captured("key", lambda: Work(run))
    assert found is not None and recorder.freed == 1 and recorder.recorded == 1


def test_a_shape_that_failed_stays_eager_when_another_runs_out_of_memory() -> None:
    """Each image would else try both again."""
    recorder = TapeRecorder([RuntimeError("not capturable")] * 2 + [torch.OutOfMemoryError("CUDA out of memory")] * 2)
    graphs = Graphs(recorder)
    work = Work(lambda: torch.ones(1))
    with told(match="not capturable"):
        assert graphs.captured("first", lambda: work) is None
    for _ in range(3):
        assert graphs.captured("second", lambda: work) is graphs.captured("first", lambda: work) is None
    assert not recorder.fail and recorder.recorded == 0
    graphs.forget()
    assert graphs.captured("first", lambda: work) is not None


def test_a_capture_that_another_thread_broke_is_tried_again() -> None:
    recorder = TapeRecorder([RuntimeError("CUDA error: operation not permitted when stream is capturing")])
    graphs = Graphs(recorder)
    graphs.captured("other", lambda: Work(lambda: torch.ones(1)))
    recorder.fail = [RuntimeError("CUDA error: operation not permitted when stream is capturing")]
    assert graphs.captured("key", lambda: Work(lambda: torch.ones(1))) is not None
    assert len(graphs) == 2 and recorder.freed == 0


def test_no_graph_is_dropped_while_it_may_be_running() -> None:
    """Its buffers would be another stream's memory at once."""
    recorder = TapeRecorder()
    graphs = Graphs(recorder, max_graphs=1)
    for key in "ab":
        graphs.captured(key, lambda: Work(lambda: torch.ones(1)))
    assert recorder.waited == 1
    graphs.forget()
    assert recorder.waited == 2


def test_eager_work_that_runs_out_of_memory_gets_that_of_the_graphs() -> None:
    recorder = TapeRecorder()
    graphs = Graphs(recorder)
    graphs.captured("key", lambda: Work(lambda: torch.ones(1)))
    errors: list[Exception] = [torch.OutOfMemoryError("CUDA out of memory")]

    def run() -> int:
        if errors:
            raise errors.pop()
        return 3

    assert graphs.eagerly(run) == 3 and len(graphs) == 0 and recorder.freed == 1
    errors.append(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError):  # nothing is left to free
        graphs.eagerly(run)
    errors.append(ValueError("something else"))
    with pytest.raises(ValueError, match="something else"):
        graphs.eagerly(run)
