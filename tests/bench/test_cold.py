"""The peak memory of a cold process, and the dtype argument of diffusers."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch

from bench.cold import dtype_argument
from bench.record import ROOT
from fastsd.bundled import BUNDLED

MIB = 2**20


def peak_of_child(megabytes: int) -> float:
    code = f"from bench.cold import resident_peak; x = bytearray({megabytes} << 20); print(resident_peak())"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    return int(process.stdout) / MIB


def test_the_peak_of_a_child_excludes_its_parents_memory() -> None:
    """`ru_maxrss` of the child would include this process: torch, and 300 MiB."""
    memory = torch.ones(300 * MIB, dtype=torch.uint8)
    little, much = peak_of_child(1), peak_of_child(100)
    assert memory[0] == 1
    assert little < 200
    assert 90 < much - little < 110


def test_the_dtype_argument_has_the_name_of_the_installed_diffusers() -> None:
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


def test_the_installed_diffusers_loads_without_a_warning_about_dtypes() -> None:
    diffusers = pytest.importorskip("diffusers")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dtype = dtype_argument(diffusers.DiffusionPipeline, torch.bfloat16)
        pipeline = diffusers.DiffusionPipeline.from_pretrained(BUNDLED["digits"], safety_checker=None, **dtype)
    assert pipeline.unet.dtype == torch.bfloat16
    assert not [warning for warning in caught if "dtype" in str(warning.message)]
