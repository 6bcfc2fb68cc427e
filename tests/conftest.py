"""What every test shares: quiet, offline libraries, and GPU tests that are skipped where there is no GPU."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import told

WORKER_MEMORY = 3 * 2**30  # 2 GiB were the most that a process of the tests took, and it starts others

# Set before anything imports them: no test may reach for the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The work here is small: two threads that wait for each other gain little, and lose tenfold on a shared machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What fastsd keeps between runs is not the user's here; the folder goes when the tests have ended.
_cache = tempfile.TemporaryDirectory(prefix="fastsd-tests-")
os.environ["FASTSD_CACHE"] = _cache.name
told.be_strict()
with contextlib.suppress(ImportError):  # the GPU tests run without it
    import hypothesis

    # The same cases each time, so that a change fails for what it changes; HYPOTHESIS_PROFILE=default draws new ones.
    hypothesis.settings.register_profile("same", derandomize=True)
    hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@pytest.hookimpl(optionalhook=True)  # pytest-xdist asks; it need not be there
def pytest_xdist_auto_num_workers() -> int:
    """One process a core, as far as the memory goes; a GPU is not shared, since tests measure what is free on it."""
    import torch

    if torch.cuda.is_available():
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    meminfo = Path("/proc/meminfo")
    free = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text()) if meminfo.exists() else None
    fit = int(free[1]) * 1024 // WORKER_MEMORY if free else cores
    count = min(cores, fit)
    return count if count > 1 else 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]  # `keywords` hold the ids of parameters too
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint of random weights that generates 64x64 in two steps."""
    import torch

    from fastsd.weights import save_folder
    from tests.support.pipelines import tiny_components

    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_folder(tiny_components(steps=2), folder, torch.float32)
    return folder


@pytest.fixture
def as_on_a_gpu() -> Iterator[None]:
    """PyTorch's operations, as CUDA runs linear layers and convolutions: oneDNN's path reads numbers on the host."""
    from fastsd.kernels import dispatch

    with dispatch.forced("torch"):
        yield


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """`cli("--prompt", "x", ...)` in an empty folder; returns how it ended."""
    from fastsd.cli import main
    from tests.support.cli import Ran

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delenv("FASTSD_DEBUG", raising=False)
    assert os.listdir() == []

    def run(*words: object) -> Ran:
        capsys.readouterr()
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return run
