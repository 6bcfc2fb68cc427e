"""A process's own peak memory, whatever its parent held."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch

from bench.cold import dtype_argument
from bench.record import ROOT
from fastsd.pipeline import BUNDLED

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


def test_a_dtype_goes_by_the_name_that_this_diffusers_has() -> None:
    class Old:
        def from_pretrained(self) -> None:
            """
            torch_dtype (`torch.dtype`, *optional*):
                Of the weights.
            """

    class New:
        def from_pretrained(self) -> None:
            """
            dtype (`torch.dtype`, *optional*):
                Of the weights.
            """

    assert dtype_argument(Old, torch.float16) == {"torch_dtype": torch.float16}
    assert dtype_argument(New, torch.float16) == {"dtype": torch.float16}


def test_the_installed_diffusers_warns_of_nothing_when_it_loads(caplog: pytest.LogCaptureFixture) -> None:
    diffusers = pytest.importorskip("diffusers")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        named = dtype_argument(diffusers.DiffusionPipeline, torch.bfloat16)
        pipeline = diffusers.DiffusionPipeline.from_pretrained(BUNDLED, safety_checker=None, **named)
    assert pipeline.unet.dtype == torch.bfloat16
    assert not [one for one in caught if "dtype" in str(one.message)]
