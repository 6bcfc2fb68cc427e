"""The Triton kernels on a CPU: in Triton's interpreter, in a separate process, at the shapes of a very small image.

Triton reads TRITON_INTERPRET when it is imported, hence the process: `python -m fastsd.verify.interpreted` prints the
results as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from typing import Any

import torch

from fastsd.errors import FastsdError
from fastsd.kernels import dispatch
from fastsd.kernels.choice.call import Call
from fastsd.kernels.choice.rule import CheckResult
from fastsd.pipeline import Pipeline
from fastsd.verify.drive import drive
from fastsd.verify.ops import check_op
from fastsd.verify.watch import has_kernel, observed

DTYPES = ("fp32", "fp16")  # the interpreter cannot multiply bf16
SIDE = 16  # pixels of the image; the latents of the bundled model are then 2 x 2 and 1 x 1


def check_in_interpreter() -> list[CheckResult]:
    """Check the kernels of the bundled model's ops in the interpreter; without Triton, one result with a note.

    Raises:
        FastsdError: the process failed.
    """
    no_triton = dispatch.why_no_triton(torch.device("cpu"))
    if no_triton is not None:
        return [CheckResult("interpreter", "Triton", note=no_triton)]
    process = subprocess.run(
        [sys.executable, "-m", "fastsd.verify.interpreted"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode:
        last_line = (process.stderr.strip().splitlines() or ["no message"])[-1]
        raise FastsdError(f"the process that runs Triton's interpreter failed: {last_line}")
    return [CheckResult(**fields) for fields in json.loads(process.stdout.splitlines()[-1])]


def check_kernels(dtype: str) -> list[CheckResult]:
    """Check the kernels in this process, whose Triton must be the interpreter."""
    pipe = Pipeline.from_pretrained("digits", device="cpu", dtype=dtype)
    calls: dict[tuple[Any, ...], Call] = {}
    # PyTorch's ops collect the calls: the interpreter is slow.
    with dispatch.forced("torch"), observed(lambda call: calls.setdefault(call.key, call.snapshot())):
        drive(pipe, "an eight", SIDE, SIDE)
    with torch.inference_mode():
        results = [check_op(call, None, "interpreter") for call in calls.values() if has_kernel(call.op.name)]
    return [replace(result, note=dtype) for result in sorted(results, key=lambda result: result.name)]


if __name__ == "__main__":
    torch.set_num_threads(1)  # the tensors are small
    print(json.dumps([asdict(result) for dtype in DTYPES for result in check_kernels(dtype)]))
