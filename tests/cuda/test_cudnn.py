"""cuDNN's switches are the caller's before and after, whoever else uses them meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from fastsd.cuda.cudnn import OURS, fixed_convolutions

CUDA = torch.device("cuda", 0)
cudnn = torch.backends.cudnn


def switches() -> tuple[bool, bool]:
    return cudnn.benchmark, cudnn.deterministic


@pytest.fixture(params=[(False, False), (True, False), (False, True)], ids=str)
def callers(request: pytest.FixtureRequest) -> Iterator[tuple[bool, bool]]:
    before = switches()
    cudnn.benchmark, cudnn.deterministic = request.param
    yield request.param
    cudnn.benchmark, cudnn.deterministic = before


def test_they_are_restored_after_an_error_too(callers: tuple[bool, bool]) -> None:
    with pytest.raises(ValueError, match="inside"), fixed_convolutions(CUDA):
        assert switches() == OURS
        raise ValueError("inside")
    assert switches() == callers


def test_the_cpu_leaves_them_alone(callers: tuple[bool, bool]) -> None:
    with fixed_convolutions(torch.device("cpu")):
        assert switches() == callers


def test_two_threads_do_not_take_them_from_each_other(callers: tuple[bool, bool]) -> None:
    """The first enters, the second enters, the first leaves, the second goes on, and leaves."""
    entered, first_left = threading.Event(), threading.Event()
    seen: list[tuple[bool, bool]] = []

    def second() -> None:
        with fixed_convolutions(CUDA):
            entered.set()
            first_left.wait(10)
            seen.append(switches())

    thread = threading.Thread(target=second)
    with fixed_convolutions(CUDA):
        thread.start()
        assert entered.wait(10)
    first_left.set()
    thread.join()
    assert seen == [OURS] and switches() == callers


def test_what_the_caller_sets_meanwhile_stays(callers: tuple[bool, bool]) -> None:
    with fixed_convolutions(CUDA):
        cudnn.benchmark, cudnn.deterministic = False, False
        with fixed_convolutions(CUDA):
            assert switches() == OURS
    assert switches() == (False, False)
    with fixed_convolutions(CUDA):
        cudnn.benchmark = False
    assert switches() == (False, True)


def test_many_threads_leave_them_as_they_were(callers: tuple[bool, bool]) -> None:
    wrong: list[tuple[bool, bool]] = []

    def enter_often() -> None:
        for _ in range(300):
            with fixed_convolutions(CUDA):
                if switches() != OURS:
                    wrong.append(switches())

    threads = [threading.Thread(target=enter_often) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and switches() == callers
