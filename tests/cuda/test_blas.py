"""The library that computes products is the caller's before and after. The switch is played."""

from __future__ import annotations

import threading

import pytest
import torch

from fastsd.cuda import blas


@pytest.fixture
def switch(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    now = ["cublas"]

    def preferred(library: str | None = None) -> str:
        if library == "none":
            raise RuntimeError("PyTorch has not been compiled with it")
        now[0] = library or now[0]
        return now[0]

    monkeypatch.setattr(torch.backends.cuda, "preferred_blas_library", preferred)
    return now


def test_it_is_restored_after_an_error_too(switch: list[str]) -> None:
    with pytest.raises(ValueError, match="inside"), blas.preferred("cublaslt"):
        with blas.preferred("cublas"):
            assert switch == ["cublas"]
        assert switch == ["cublaslt"]
        raise ValueError("inside")
    assert switch == ["cublas"]
    with pytest.raises(RuntimeError, match="not been compiled"), blas.preferred("none"):
        pass
    assert switch == ["cublas"]


def test_one_thread_at_a_time_is_inside(switch: list[str]) -> None:
    entered = threading.Event()

    def other() -> None:
        with blas.preferred("cublas"):
            entered.set()

    thread = threading.Thread(target=other)
    with blas.preferred("cublaslt"):
        thread.start()
        assert not entered.wait(0.05) and switch == ["cublaslt"]
    thread.join()
    assert entered.is_set() and switch == ["cublas"]
