"""Fixtures of the evaluation tests: MNIST, the committed reader, real digits in place of generated ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastsd.evaluate.digits.measures import canonical
from fastsd.evaluate.digits.reader import DigitReader, load_reader
from fastsd.evaluate.digits.report import augmented
from fastsd.evaluate.digits.samples import GeneratedDigits
from fastsd.train.digits import Digits, enlarge, read_digits

ROOT = Path(__file__).parent.parent.parent.parent


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
def training_subset(mnist: Path) -> Digits:
    """The first 6,000 training images: enough for every measure in these tests, in a tenth of the time."""
    training = read_digits(mnist)
    return Digits(training.images[:6000], training.labels[:6000])


@pytest.fixture(scope="session")
def reader(reader_file: Path) -> DigitReader:
    return load_reader(reader_file)


@pytest.fixture(scope="session")
def training_shapes(training_subset: Digits) -> torch.Tensor:
    return canonical(enlarge(training_subset.images))


@pytest.fixture(scope="session")
def perfect(held_out: Digits) -> GeneratedDigits:
    """The output of a perfect model: 500 real digits from outside the training set."""
    images, labels = augmented(held_out, 500)
    return GeneratedDigits(images, labels.astype("int64"))
