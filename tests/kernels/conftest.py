"""Where the Triton kernels' tests run (see test_triton_interpreted.py), and on how many threads all of them do."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# Triton decides at its import whether it interprets, so these need a process of their own where there is no GPU.
collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available() else ["triton"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The ops here are small, and threads that wait for each other are slow on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
