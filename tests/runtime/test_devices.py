"""Devices by name, with CUDA played."""

from __future__ import annotations

import pytest
import torch

from fastsd.errors import FastsdError
from fastsd.runtime.devices import resolve_device


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
