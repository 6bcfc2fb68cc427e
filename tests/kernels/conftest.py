"""Where the tests of the Triton kernels run (see test_triton_interpreted.py), and the number of threads."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# Triton decides at import whether it interprets, so without a GPU these run in a separate process.
collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available() else ["triton"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The ops are small, and synchronising threads is slow on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
