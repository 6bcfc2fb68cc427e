"""What every test shares: quiet, offline libraries, and GPU tests that are skipped where there is no GPU."""

from __future__ import annotations

import os
import tempfile

import pytest

# Set before anything imports them: no test may reach for the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The work here is small: two threads that wait for each other gain little, and lose tenfold on a shared machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What fastsd keeps between runs is not the user's here; the folder goes when the tests have ended.
_cache = tempfile.TemporaryDirectory(prefix="fastsd-tests-")
os.environ["FASTSD_CACHE"] = _cache.name


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if "gpu" in item.keywords]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
