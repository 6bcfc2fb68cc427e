"""No kernel reads or writes outside its buffers: NVIDIA's memcheck over their own tests, where it is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parent.parent.parent
# The tables of shapes alone: mutations go out of bounds on purpose, and drawn shapes take too long here.
CHOSEN = "not notice and not any_shape and not refuses and not fit"


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("op", ["advance", "flash_attn", "geglu", "groupnorm_silu", "layernorm"])
def test_memcheck(op: str) -> None:
    words = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "99", "--target-processes", "all"]
    words += [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x", "-k", CHOSEN]
    words += [str(ROOT / "tests" / "kernels" / f"test_{op}_triton.py")]
    # PyTorch's pool would hide an access beyond a tensor: with it off every tensor is an allocation of its own.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
