"""All tests/kernels/triton in Triton's interpreter, in one process of their own.

Triton reads TRITON_INTERPRET when it is imported, and with it every op of this process would have to be interpreted.
On a machine with a GPU the same files are collected here too, and run compiled.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastsd.kernels import dispatch

pytestmark = pytest.mark.heavy

HERE = Path(__file__).parent


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the process of its own")
def test_triton_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="no Triton for this platform")
    reason = dispatch.why_no_triton(torch.device("cpu"))
    if reason is not None:
        pytest.skip(reason)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "ignore", "--no-header", str(HERE / "triton")],
        cwd=HERE.parent.parent,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
