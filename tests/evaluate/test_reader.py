"""The judge: it reads real digits, in every size that is drawn, and a damaged one is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fastsd.errors import FastsdError
from fastsd.evaluate.reader import Reader, load_reader, read, save_reader, to_input, train_reader
from fastsd.train.digits import Digits, enlarge


def share_read(reader: Reader, pictures: torch.Tensor, labels: np.ndarray) -> float:
    return float((read(reader, pictures).numpy() == labels).mean())


def test_committed_reader_reads_mnist(reader: Reader, held_out: Digits) -> None:
    """2,000 pictures from the middle of the test set: its first half is the harder one (NIST's other writers)."""
    chosen = slice(4000, 6000)
    pictures = torch.from_numpy(held_out.images[chosen].copy()).float() / 255
    assert share_read(reader, pictures, held_out.labels[chosen]) >= 0.99


@pytest.mark.parametrize("scale", [0.7, 1.0, 1.15], ids=["smallest", "nominal", "largest"])
@pytest.mark.parametrize("shear", [-0.2, 0.2], ids=["left", "right"])
def test_committed_reader_reads_drawn_sizes(reader: Reader, held_out: Digits, scale: float, shear: float) -> None:
    """The ends of what the digits model draws: at most 10 of 500 misread, where the model's own check allows it 15."""
    chosen = slice(4750, 5250)
    pictures = enlarge(held_out.images[chosen], scale, shear)
    assert share_read(reader, pictures, held_out.labels[chosen]) >= 0.98


def test_both_sizes_come_in_one_frame(held_out: Digits) -> None:
    """A 28 x 28 picture and the same at 64 x 64 put the ink at the same place, to a quarter of an input pixel."""
    images = held_out.images[:50]
    small, large = to_input(torch.from_numpy(images.copy()).float() / 255)[:, 0], to_input(enlarge(images))[:, 0]
    ramp = torch.arange(32.0)

    def centre(x: torch.Tensor) -> torch.Tensor:
        mass = x.sum((1, 2))
        return torch.stack([x.sum(2) @ ramp / mass, x.sum(1) @ ramp / mass])

    assert small.shape == large.shape == (50, 32, 32)
    assert (centre(small) - centre(large)).abs().max() < 0.25


def test_training_learns_and_repeats(some_training: Digits, held_out: Digits) -> None:
    """One epoch of 6,000 pictures reads most others; the same seed gives the same weights, whatever came before."""
    pictures = torch.from_numpy(held_out.images[:500].copy()).float() / 255
    trained = train_reader(some_training.images, some_training.labels, epochs=1)
    assert share_read(trained, pictures, held_out.labels[:500]) > 0.8
    few = some_training.images[:500], some_training.labels[:500]
    first = train_reader(*few, epochs=1, seed=3)
    torch.rand(5)
    again = train_reader(*few, epochs=1, seed=3)
    for name, weight in first.state_dict().items():
        torch.testing.assert_close(weight, again.state_dict()[name], rtol=0, atol=0, msg=name)


def test_weights_survive_the_file(tmp_path: Path, reader: Reader, held_out: Digits) -> None:
    pictures = torch.from_numpy(held_out.images[:300].copy()).float() / 255
    save_reader(reader, tmp_path / "reader.safetensors")
    assert torch.equal(read(load_reader(tmp_path / "reader.safetensors"), pictures), read(reader, pictures))


@pytest.mark.parametrize("kind", ["missing", "junk", "others"])
def test_a_wrong_file_is_refused(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "reader.safetensors"
    if kind == "junk":
        file.write_bytes(b"not weights")
    if kind == "others":
        save_file({"out.weight": torch.zeros(10, 3)}, file)
    with pytest.raises(FastsdError, match="--reader .*reader.safetensors") as caught:
        load_reader(file)
    assert "\n" not in str(caught.value)
