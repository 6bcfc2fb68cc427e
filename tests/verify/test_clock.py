"""The clocks distinguish a slow function from a fast one."""

from __future__ import annotations

import time

import pytest
import torch

from fastsd.verify.clock import clock_for, cpu_seconds, gpu_seconds


def test_the_cpu_clock_distinguishes_sleeps() -> None:
    short, long = cpu_seconds([lambda: time.sleep(0.002), lambda: time.sleep(0.02)])
    assert 0.002 <= short < long and long >= 0.02


def test_each_device_has_its_clock() -> None:
    assert clock_for(torch.device("cpu")) is cpu_seconds and clock_for(torch.device("cuda")) is gpu_seconds


@pytest.mark.gpu
def test_the_gpu_clock_distinguishes_sizes() -> None:
    small, large = (torch.randn(n, n, device="cuda") for n in (256, 4096))
    quick, slow = gpu_seconds([lambda: small @ small, lambda: large @ large])
    assert 0 < quick < slow / 10


@pytest.mark.gpu
def test_a_function_that_waits_for_the_gpu_is_timed_without_a_graph() -> None:
    x = torch.ones(4, device="cuda")
    assert gpu_seconds([lambda: x.sum().item()])[0] > 0
