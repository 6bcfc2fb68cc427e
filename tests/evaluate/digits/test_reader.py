"""The digit reader: accurate on real digits of every generated size; damaged files are errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fastsd.errors import FastsdError
from fastsd.evaluate.digits.checks import MIN_READ_SHARE, MIN_READER_ACCURACY
from fastsd.evaluate.digits.reader import SCALES, DigitReader, load_reader, read, save_reader, to_input, train_reader
from fastsd.train.digits import Digits, enlarge
from fastsd.train.settings import DigitsData

pytestmark = pytest.mark.heavy


def accuracy(reader: DigitReader, images: torch.Tensor, labels: np.ndarray) -> float:
    return float((read(reader, images).numpy() == labels).mean())


def test_committed_reader_reads_mnist(reader: DigitReader, held_out: Digits) -> None:
    """2,000 images from the middle of the test set; its first half, by other writers, is the harder one."""
    chosen = slice(4000, 6000)
    images = torch.from_numpy(held_out.images[chosen].copy()).float() / 255
    assert accuracy(reader, images, held_out.labels[chosen]) >= MIN_READER_ACCURACY


@pytest.mark.parametrize(
    "scale", [DigitsData.scales[0], 1.0, DigitsData.scales[1]], ids=["smallest", "nominal", "largest"]
)
@pytest.mark.parametrize("shear", [-DigitsData.shear, DigitsData.shear], ids=["left", "right"])
def test_committed_reader_reads_generated_sizes(
    reader: DigitReader, held_out: Digits, scale: float, shear: float
) -> None:
    """At the extremes of the training images, the reader makes at most 2/3 of the errors that the model may make."""
    chosen = slice(4750, 5250)
    images = enlarge(held_out.images[chosen], scale, shear)
    assert 1 - accuracy(reader, images, held_out.labels[chosen]) <= 2 / 3 * (1 - MIN_READ_SHARE)


def test_the_reader_is_trained_beyond_the_sizes_of_the_model() -> None:
    assert SCALES[0] < DigitsData.scales[0] and SCALES[1] > DigitsData.scales[1]


def test_both_sizes_are_framed_alike(held_out: Digits) -> None:
    """A 28 x 28 image and its 64 x 64 version have their ink at the same position, to a quarter of an input pixel."""
    images = held_out.images[:50]
    small, large = to_input(torch.from_numpy(images.copy()).float() / 255)[:, 0], to_input(enlarge(images))[:, 0]
    ramp = torch.arange(32.0)

    def centre(x: torch.Tensor) -> torch.Tensor:
        mass = x.sum((1, 2))
        return torch.stack([x.sum(2) @ ramp / mass, x.sum(1) @ ramp / mass])

    assert small.shape == large.shape == (50, 32, 32)
    assert (centre(small) - centre(large)).abs().max() < 0.25


def test_training_learns_and_is_repeatable(training_subset: Digits, held_out: Digits) -> None:
    """After one epoch of 6,000 images, most others are read; the same seed gives the same weights."""
    images = torch.from_numpy(held_out.images[:500].copy()).float() / 255
    trained = train_reader(training_subset.images, training_subset.labels, epochs=1)
    assert accuracy(trained, images, held_out.labels[:500]) > 0.8
    few = training_subset.images[:500], training_subset.labels[:500]
    first = train_reader(*few, epochs=1, seed=3)
    torch.rand(5)  # the state of the global generator must not matter
    again = train_reader(*few, epochs=1, seed=3)
    for name, weight in first.state_dict().items():
        torch.testing.assert_close(weight, again.state_dict()[name], rtol=0, atol=0, msg=name)


def test_saved_weights_read_the_same(tmp_path: Path, reader: DigitReader, held_out: Digits) -> None:
    images = torch.from_numpy(held_out.images[:300].copy()).float() / 255
    save_reader(reader, tmp_path / "reader.safetensors")
    assert torch.equal(read(load_reader(tmp_path / "reader.safetensors"), images), read(reader, images))


@pytest.mark.parametrize("kind", ["missing", "damaged", "other weights"])
def test_a_wrong_file_is_an_error(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "reader.safetensors"
    if kind == "damaged":
        file.write_bytes(b"not weights")
    if kind == "other weights":
        save_file({"out.weight": torch.zeros(10, 3)}, file)
    with pytest.raises(FastsdError, match="reader.safetensors") as caught:
        load_reader(file)
    assert "\n" not in str(caught.value)
