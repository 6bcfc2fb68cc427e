"""Which backend runs: forced ones nest and end, gradients exclude what has none."""

from __future__ import annotations

import threading

import pytest
import torch

from fastsd.kernels import dispatch


def test_forced_backends_nest_and_end():
    x = torch.ones(1)
    usual = dispatch.backend(x)
    with dispatch.reference_only():
        with dispatch.forced("torch"):
            assert dispatch.backend(x) == "torch"
        assert dispatch.backend(x) == "reference"
    assert dispatch.backend(x) == usual
    with pytest.raises(KeyError), dispatch.reference_only():
        raise KeyError
    assert dispatch.backend(x) == usual


def test_forcing_concerns_one_thread():
    seen = []
    with dispatch.reference_only():
        thread = threading.Thread(target=lambda: seen.append(dispatch.backend(torch.ones(1))))
        thread.start()
        thread.join()
    assert seen != ["reference"]


def test_gradients_take_the_torch_backend():
    x, w = torch.ones(2), torch.ones(2, requires_grad=True)
    assert dispatch.backend(x, None, w) == "torch"
    with torch.no_grad():
        assert dispatch.backend(x, None, w) == dispatch.backend(x)


def test_what_onednn_does_not_compute_takes_the_torch_backend():
    for x in (
        torch.ones(2, dtype=torch.float64),
        torch.ones(2, dtype=torch.float16),
        torch.ones(0),
        torch.ones(2, device="meta"),
    ):
        assert dispatch.backend(x) == "torch"
