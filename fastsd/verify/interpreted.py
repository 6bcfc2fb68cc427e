"""Our kernels without a GPU: in Triton's interpreter, in a process of its own, at the shapes of a very small picture.

Triton reads TRITON_INTERPRET when it is imported, hence the process: `python -m fastsd.verify.interpreted`
prints its rows as JSON.
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
from fastsd.pipeline import Pipeline
from fastsd.verify.drive import drive
from fastsd.verify.ops import check_op
from fastsd.verify.rule import Row
from fastsd.verify.watch import Call, has_kernel, watched

DTYPES = ("fp32", "fp16")  # the interpreter cannot multiply bf16
SIDE = 16  # pixels of the bundled model's picture: latents of 2 x 2 and 1 x 1


def in_another_process() -> list[Row]:
    """The rows of the bundled model's ops that have kernels, in the interpreter; one row with a note where there is
    no Triton.

    Raises:
        FastsdError: the process failed.
    """
    missing = dispatch.why_no_triton(torch.device("cpu"))
    if missing is not None:
        return [Row("interpreter", "Triton", note=missing)]
    done = subprocess.run(
        [sys.executable, "-m", "fastsd.verify.interpreted"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise FastsdError(f"the process that runs Triton's interpreter failed: {last}")
    return [Row(**row) for row in json.loads(done.stdout.splitlines()[-1])]


def rows(dtype: str) -> list[Row]:
    """The comparison itself; for a process in which Triton interprets."""
    pipe = Pipeline.from_pretrained("digits", device="cpu", dtype=dtype)
    calls: dict[tuple[Any, ...], Call] = {}
    with dispatch.forced("torch"), watched(lambda call: calls.setdefault(call.key, call.kept())):  # much faster
        drive(pipe, "an eight", SIDE, SIDE)
    with torch.inference_mode():
        found = [check_op(call, None, "interpreter") for call in calls.values() if has_kernel(call.op.name)]
    return [replace(row, note=dtype) for row in sorted(found, key=lambda row: row.name)]


if __name__ == "__main__":
    torch.set_num_threads(1)  # the tensors are small
    print(json.dumps([asdict(row) for dtype in DTYPES for row in rows(dtype)]))
