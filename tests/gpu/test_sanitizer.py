"""No kernel accesses memory outside its buffers: NVIDIA's memcheck runs the kernel tests, if it is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parent.parent.parent
# A file for each kernel; the test of whole models takes too long here.
KERNEL_TESTS = sorted(
    set((ROOT / "tests/kernels/triton").glob("test_*.py")) - {ROOT / "tests/kernels/triton/test_models.py"}
)
# Only the tables of shapes: mutated kernels access memory out of bounds on purpose, and random shapes take too long.
SELECTED = "not notice and not any_shape and not refuses and not fit"


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("file", KERNEL_TESTS, ids=lambda file: file.stem)
def test_memcheck(file: Path) -> None:
    command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "99", "--target-processes", "all"]
    command += [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x", "-k", SELECTED, str(file)]
    # PyTorch's memory pool would hide an access beyond a tensor. Without it, every tensor is a separate allocation.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout[-4000:] + process.stderr[-1000:]
