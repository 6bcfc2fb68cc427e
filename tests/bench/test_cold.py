"""A process's own peak memory, whatever its parent held."""

from __future__ import annotations

import subprocess
import sys

import torch

from bench.record import ROOT

MIB = 2**20


def peak_of_child(megabytes: int) -> float:
    code = f"from bench.cold import resident_peak as peak; x = bytearray({megabytes} << 20); print(peak())"
    return int(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True).stdout) / MIB


def test_a_child_counts_its_own_memory_and_not_its_parents() -> None:
    """ru_maxrss would give this process's own peak, torch and 300 MiB, for a child that has imported neither."""
    held = torch.ones(300 * MIB, dtype=torch.uint8)
    little, much = peak_of_child(1), peak_of_child(100)
    assert held[0] == 1
    assert little < 200
    assert 90 < much - little < 110
