"""An op whose candidates end the process that runs them, each in its own way. A child imports this module."""

from __future__ import annotations

import os
import sys
import time

import torch

from fastsd.kernels.candidates import GpuOp, OpCandidate


def aborts(x: torch.Tensor) -> torch.Tensor:
    os.write(2, b"much before\n" * 10_000 + b"this is why\n")
    os.abort()


def is_killed(x: torch.Tensor) -> torch.Tensor:
    os.kill(os.getpid(), 9)
    return x


def leaves(x: torch.Tensor) -> torch.Tensor:
    sys.exit(3)


def hangs(x: torch.Tensor) -> torch.Tensor:
    os.write(2, b"it begins")
    time.sleep(600)
    return x


def faults(x: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with TORCH_USE_CUDA_DSA.")


def fails(x: torch.Tensor) -> torch.Tensor:
    raise TypeError("it does not compile")


def doubles(x: torch.Tensor) -> torch.Tensor:
    print("what a kernel prints is no answer")
    return 2 * x


def double_ref(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


WAYS = [fails, doubles, aborts, leaves, is_killed, hangs, faults]
OP = GpuOp(
    "dying", double_ref, (*(OpCandidate(run.__name__, run) for run in WAYS), OpCandidate("torch", lambda x: 2 * x))
)
