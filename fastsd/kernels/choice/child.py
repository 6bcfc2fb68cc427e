"""The process in which ways are tried: it says what it is about to run, runs it, and may die of it.

It reads a request a line from its input, `{"module": ..., "op": ..., "args": ..., "ways": ...}`, and answers "about I"
before the way I, "lost REASON" if the GPU is lost, and "done" after the last. The arguments' numbers are random.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

from fastsd.kernels.choice.faults import device_is_lost, reason_of
from fastsd.kernels.choice.op import GPU_OPS, decoded
from fastsd.kernels.choice.table import TableEntry


def main() -> None:
    """Answer requests until there are no more."""
    device = torch.device(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what kernels and libraries print is no answer

    def answer(line: str) -> None:
        answers.write(line + "\n")
        answers.flush()

    torch.zeros(1, dtype=torch.float32, device=device)
    answer("ready")
    for line in sys.stdin:
        with torch.inference_mode():
            run(json.loads(line), device, answer)
        answer("done")


def run(request: dict[str, Any], device: torch.device, answer: Callable[[str], None]) -> None:
    """Run the ways of a request. What fails without losing the GPU is found by our parent as well."""
    importlib.import_module(request["module"])
    op, args = GPU_OPS[request["op"]], decoded(request["args"], device)
    for i, stored in enumerate(request["ways"]):
        way = TableEntry(**stored).way(op)
        if way is None:
            continue
        answer(f"about {i}")
        try:
            op.outputs(way, args)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except Exception as error:
            if device_is_lost(error):
                answer(f"lost {reason_of(error)}")
                os._exit(1)


if __name__ == "__main__":
    main()
