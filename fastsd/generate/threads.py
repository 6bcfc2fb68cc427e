"""How many threads compute a model on a CPU, in the processes that are fastsd's own: the command and its workers.

A program that imports fastsd keeps the number that it has.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastsd.components import Components

GIVEN = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # the environment variables by which a user says how many
# Parameters of a UNet times pixels of its latent, below which one thread is faster than two: they meet at every op, and
# wait longer for each other than an op of a small map takes (docs/numerics.md).
SMALL = 2**31


@contextmanager
def suited_threads(components: Components, device: torch.device) -> Iterator[None]:
    """Inside, a small model on the CPU is computed by one thread, unless the user has said how many."""
    before = torch.get_num_threads()
    if device.type == "cpu" and is_small(components) and not any(name in os.environ for name in GIVEN):
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def is_small(components: Components) -> bool:
    """Whether an image of the size that the model was trained at is little work for each op."""
    parameters = sum(each.numel() for each in components.unet.parameters())
    return parameters * components.sample_size**2 < SMALL
