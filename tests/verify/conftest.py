"""The bundled model in fp32, on one thread: its ops are small."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from fastsd.pipeline import Pipeline
from fastsd.verify.drive import drive


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def pipe() -> Pipeline:
    return Pipeline.from_pretrained("digits", device="cpu", dtype="fp32")


@pytest.fixture(scope="session")
def short_run(pipe: Pipeline) -> Callable[[], None]:
    """A run that calls every network of the bundled model."""
    return lambda: drive(pipe, "an eight", 64, 64)
