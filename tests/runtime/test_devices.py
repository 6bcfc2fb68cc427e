"""Devices by name, with CUDA played."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fastsd.errors import FastsdError
from fastsd.runtime.devices import autoencoder_dtype, resolve_device

FORKED = """
import os
import torch
from fastsd.errors import FastsdError
from fastsd.runtime.devices import undisturbed

def compute():
    with undisturbed():
        torch.randn(2000, 2000).relu_()

torch.set_num_threads(2)
compute()
child = os.fork()
if child:
    compute()
    os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
try:
    compute()
except FastsdError as error:
    assert "set_num_threads(1)" in str(error)
    torch.set_num_threads(1)
    compute()
    os._exit(0)
os._exit(1)
"""


@pytest.mark.heavy
@pytest.mark.skipif(sys.platform != "linux", reason="GNU OpenMP's threads")
def test_a_fork_of_a_process_that_computed_is_refused_instead_of_waiting_without_end() -> None:
    done = subprocess.run([sys.executable, "-c", FORKED], timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"is_available": True, "device_count": 2, "current_device": 1}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)


@pytest.mark.usefixtures("two_gpus")
def test_cuda_is_the_current_device_for_good() -> None:
    """Else weights stay on one device, and after `torch.cuda.set_device` noise goes to another."""
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda", 1)
    assert resolve_device(torch.device("cuda", 0)) == torch.device("cuda", 0)
    with pytest.raises(FastsdError, match="this machine has 2 CUDA devices"):
        resolve_device("cuda:2")


@pytest.mark.parametrize(
    ("capability", "hip", "expected"),
    [((7, 5), None, torch.float32), ((8, 0), None, torch.bfloat16), ((9, 0), None, torch.bfloat16),
     ((7, 0), "6.2", torch.bfloat16)],
)  # fmt: skip
def test_an_autoencoder_that_overflows_fp16_gets_a_range_that_the_gpu_has(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], hip: str | None, expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    gpu = torch.device("cuda", 0)
    assert autoencoder_dtype(torch.float16, gpu, overflows=True) == expected
    for dtype in (torch.bfloat16, torch.float32):
        assert autoencoder_dtype(dtype, gpu, overflows=True) == dtype
    assert autoencoder_dtype(torch.float16, gpu, overflows=False) == torch.float16  # sdxl-vae-fp16-fix says so
    assert autoencoder_dtype(torch.float16, torch.device("cpu"), overflows=True) == torch.float32
