"""How a CUDA device takes times: small calls from a graph, long ones directly. CUDA is played."""

from __future__ import annotations

import threading

import pytest
import torch

from fastsd.cuda.capture import alone
from fastsd.kernels.choice.machine import CALLS, GRAPH, HELD, CudaMachine, calls_in_graph
from tests.support import played_cuda
from tests.support.played_cuda import PlayedCuda

SMALL, LONG = 1e-5, 2 * GRAPH


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> PlayedCuda:
    return played_cuda.install(monkeypatch)


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the next pairs of events measure."""
    measured: list[float] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            pass

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: Event) -> float:
            return 1000 * measured.pop(0)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    return measured


def call(play: PlayedCuda, nbytes: int = 8) -> torch.Tensor:
    play.product()
    return torch.empty(nbytes, dtype=torch.uint8)


def test_a_small_call_is_replayed_many_times_from_a_graph(play: PlayedCuda, seconds: list[float]) -> None:
    seconds += [SMALL, CALLS * 5e-6]
    sample = CudaMachine().sampler(lambda: call(play))
    assert sample() == pytest.approx(5e-6)
    assert play.events.count("product on 1") == 2 + CALLS  # a warm-up, one by itself, and those in the graph
    assert play.events[-1] == "replay on 0" and play.capturing is None and play.current.number == 0


def test_a_long_call_is_timed_without_a_graph_and_its_first_time_counts(play: PlayedCuda, seconds: list[float]) -> None:
    seconds += [LONG, 3 * LONG]
    sample = CudaMachine().sampler(lambda: call(play))
    assert [sample(), sample()] == pytest.approx([LONG, 3 * LONG])
    assert play.events.count("product on 0") == 1 and play.users == {}


def test_a_call_that_cannot_be_captured_is_timed_without_a_graph(play: PlayedCuda, seconds: list[float]) -> None:
    """It waits for the GPU, say. The capture ends, for the allocator too."""
    seconds += [SMALL, 7e-6, 8e-6]
    play.faults["capture_end"] = [RuntimeError("operation failed due to a previous error during capture")]
    runs = 0

    def run() -> torch.Tensor:
        nonlocal runs
        runs += 1
        if runs == 3:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing (invalid argument)")
        return call(play)

    sample = CudaMachine().sampler(run)
    assert [sample(), sample()] == pytest.approx([SMALL, 7e-6])
    assert play.capturing is None and play.current.number == 0 and set(play.users.values()) == {0}


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: an illegal memory access")]
)
def test_lost_memory_and_a_lost_gpu_are_raised(play: PlayedCuda, seconds: list[float], error: Exception) -> None:
    seconds.append(SMALL)
    play.faults["product"] = []

    def run() -> torch.Tensor:
        if play.capturing is not None:
            raise error
        return call(play)

    with pytest.raises(type(error), match=str(error)):
        CudaMachine().sampler(run)
    assert play.capturing is None and play.current.number == 0


def test_graphs_are_dropped_and_much_memory_returned(
    play: PlayedCuda, seconds: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    machine = CudaMachine()
    for nbytes in (8, HELD):
        seconds.append(SMALL)
        machine.sampler(lambda nbytes=nbytes: call(play, nbytes))
        machine.release()
    assert play.events.count("reset") == 2 and len(emptied) == 1
    assert play.streams == 1  # one for all: each has workspaces of its own


def test_only_real_tensors_of_a_gpu_are_measured() -> None:
    class Like(torch.Tensor):
        pass

    assert not CudaMachine().measures(torch.ones(1))
    assert not CudaMachine().measures(torch.ones(1).as_subclass(Like))


def test_calls_in_a_graph() -> None:
    assert calls_in_graph(1e-9) == calls_in_graph(1e-6) == CALLS
    assert calls_in_graph(GRAPH / 2) == 2 and calls_in_graph(1.0) == 1


def test_nobody_waits_for_the_device_while_another_thread_captures(play: PlayedCuda) -> None:
    """CUDA would refuse, and the GPU would be taken for lost."""
    capturing, waited = threading.Event(), threading.Event()

    def capture() -> None:
        with alone:
            play.capturing = 1
            capturing.set()
            waited.wait(0.3)
            play.capturing = None

    thread = threading.Thread(target=capture)
    thread.start()
    assert capturing.wait(10)
    CudaMachine().synchronize(torch.device("cuda", 0))
    waited.set()
    thread.join()
