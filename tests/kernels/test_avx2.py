"""The CPU path as on processors without AVX-512, in a separate process.

PyTorch and oneDNN choose their code when they are loaded. On AVX2 sums have a different order, and oneDNN does not
compute in bf16.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastsd.kernels import dispatch

TESTS = Path(__file__).parent.parent
SELECTION = [
    "kernels/cpu/test_choices.py",
    "kernels/cpu/test_winograd.py",
    "kernels/test_avx2.py",
    "kernels/test_conv2d.py",
    "kernels/test_dispatch.py",
    "kernels/test_flash_attn.py",
    "kernels/test_geglu.py",
    "kernels/test_groupnorm_silu.py",
    "kernels/test_layernorm.py",
    "kernels/test_linear.py",
    "kernels/test_upsample2x.py",
    "agreement/test_modules.py",
    "agreement/test_bundled.py",
    "support/test_precision.py",
]
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
INSIDE = all(os.environ.get(name) == value for name, value in AVX2.items())


def reason() -> str | None:
    """Why this machine cannot run the selection on AVX2, or needs no separate process for it."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"{platform.machine()} is not x86"
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in ("AVX2", "AVX512"):
        return f"no AVX2: PyTorch reports {capability}"
    if INSIDE or (capability == "AVX2" and torch.bfloat16 not in dispatch.onednn_dtypes()):
        return "this process runs on AVX2 already"
    return None


def test_the_process_uses_avx2():
    if not INSIDE:
        pytest.skip("not the process on AVX2")
    assert torch.backends.cpu.get_cpu_capability() == "AVX2"
    assert dispatch.onednn_dtypes() == (torch.float32,)


@pytest.mark.heavy
def test_on_avx2():
    if (skipped := reason()) is not None:
        pytest.skip(skipped)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--no-header", *(str(TESTS / t) for t in SELECTION)],
        cwd=TESTS.parent,
        env={**os.environ, **AVX2, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
