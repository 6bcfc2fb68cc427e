"""What the evaluation's tests share: MNIST, the committed reader, and real digits in the place of drawings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastsd.evaluate.measures import canonical
from fastsd.evaluate.reader import Reader, load_reader
from fastsd.evaluate.report import as_drawn
from fastsd.evaluate.samples import Drawn
from fastsd.train.digits import Digits, enlarge, read_digits

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="session")
def mnist() -> Path:
    return ROOT / "data" / "mnist"


@pytest.fixture(scope="session")
def reader_file() -> Path:
    return ROOT / "tests" / "data" / "digit_reader.safetensors"


@pytest.fixture(scope="session")
def held_out(mnist: Path) -> Digits:
    return read_digits(mnist, "t10k")


@pytest.fixture(scope="session")
def some_training(mnist: Path) -> Digits:
    """The first 6,000 of the training set: enough for every measure here, in a tenth of the time."""
    training = read_digits(mnist)
    return Digits(training.images[:6000], training.labels[:6000])


@pytest.fixture(scope="session")
def reader(reader_file: Path) -> Reader:
    return load_reader(reader_file)


@pytest.fixture(scope="session")
def training_shapes(some_training: Digits) -> torch.Tensor:
    return canonical(enlarge(some_training.images))


@pytest.fixture(scope="session")
def honest(held_out: Digits) -> Drawn:
    """What a perfect model would draw: 500 real digits that nothing was trained on."""
    pictures, labels = as_drawn(held_out, 500)
    return Drawn(pictures, labels.astype("int64"))
