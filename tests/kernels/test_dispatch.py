"""The choice of a backend: forced backends nest and end, gradients exclude the fast paths."""

from __future__ import annotations

import threading

import pytest
import torch

from fastsd.kernels import dispatch
from fastsd.kernels.linear import linear
from tests.support.told import told


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


def test_a_forced_backend_applies_to_one_thread():
    names = []
    with dispatch.reference_only():
        thread = threading.Thread(target=lambda: names.append(dispatch.backend(torch.ones(1))))
        thread.start()
        thread.join()
    assert names != ["reference"]


def test_gradients_take_the_torch_backend():
    x, w = torch.ones(2), torch.ones(2, requires_grad=True)
    assert dispatch.backend(x, None, w) == "torch"
    with torch.no_grad():
        assert dispatch.backend(x, None, w) == dispatch.backend(x)


def test_autocast_takes_the_torch_backend():
    """There an input may be bf16 where the weights are fp32; a training's frozen layers are called so."""
    x, w = torch.ones(2, 2, dtype=torch.bfloat16), torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert dispatch.backend(x, w) == "torch"
        assert linear(x, w).dtype == torch.bfloat16


def test_tensors_that_onednn_does_not_take_use_the_torch_backend():
    for x in (
        torch.ones(2, dtype=torch.float64),
        torch.ones(2, dtype=torch.float16),
        torch.ones(0),
        torch.ones(2, device="meta"),
    ):
        assert dispatch.backend(x) == "torch"


def test_an_op_without_onednn_takes_its_cpu_path_in_every_dtype(monkeypatch: pytest.MonkeyPatch):
    """Even on a processor where oneDNN computes in none."""
    monkeypatch.setattr(dispatch, "onednn_dtypes", lambda: ())
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.ones(2, dtype=dtype)
        assert (dispatch.backend(x), dispatch.backend(x, op="groupnorm_silu")) == ("torch", "onednn")
        assert dispatch.backend(x.requires_grad_(True), op="groupnorm_silu") == "torch"
        with dispatch.forced("torch"):
            assert dispatch.backend(x, op="groupnorm_silu") == "torch"


def test_one_warning_if_triton_cannot_run(monkeypatch: pytest.MonkeyPatch):
    """No GPU is needed: only the name and the capability of the device are read."""
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(dispatch.importlib.metadata, "version", lambda name: "3.7.1")
    assert dispatch.why_no_triton(gpu) == "Old GPU has compute capability 7.0, they need 7.5 or newer"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert dispatch.why_no_triton(gpu) is None
    monkeypatch.setattr(dispatch.importlib.metadata, "version", lambda name: "3.5.0")
    assert "3.5.0 is too old" in str(dispatch.why_no_triton(gpu))
    dispatch._can_run_triton.cache_clear()
    with told(match="PyTorch's are used, which are slower"):
        assert not dispatch._can_run_triton(gpu)
    assert not dispatch._can_run_triton(gpu)  # no second warning, which would be an error here
    dispatch._can_run_triton.cache_clear()

    def missing(name: str) -> str:
        raise dispatch.importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(dispatch.importlib.metadata, "version", missing)
    assert "not installed" in str(dispatch.why_no_triton(gpu))


@pytest.mark.parametrize(
    ("triton", "numpy", "reason"),
    [
        ("3.6.0", "2.4.6", "the interpreter of Triton 3.6.0 needs numpy older than 2.4, this is 2.4.6"),
        ("3.6.0", "2.3.5", None),
        ("3.7.0", "2.4.6", None),
    ],
)
def test_which_numpy_the_interpreter_of_triton_takes(
    triton: str, numpy: str, reason: str | None, monkeypatch: pytest.MonkeyPatch
):
    """Triton 3.6 makes numbers of arrays of one element, which numpy 2.4 refuses; on a GPU neither is asked."""
    monkeypatch.setattr(dispatch.importlib.metadata, "version", {"triton": triton, "numpy": numpy}.__getitem__)
    assert dispatch.why_no_triton(torch.device("cpu")) == reason


def test_a_forced_kernel_refuses_gradients():
    from fastsd.kernels.layernorm import layernorm

    pytest.importorskip("triton")
    w = torch.ones(8, requires_grad=True)
    with dispatch.forced("triton"), pytest.raises(ValueError, match="layernorm: the kernel has no gradients"):
        layernorm(torch.ones(2, 8), w, torch.zeros(8), 1e-5)
