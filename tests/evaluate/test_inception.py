"""The Inception network of FID: its shape, figures of another program's, and files that are not it."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastsd.errors import FastsdError
from fastsd.evaluate.inception import CLASSES, FEATURES, FidInception, load_inception
from tests.support.inception import made_up_weights


def test_it_has_the_published_size() -> None:
    with torch.device("meta"):
        network = FidInception()
    assert sum(weight.numel() for weight in network.parameters()) == 23_850_960


@pytest.mark.heavy
def test_it_computes_what_torch_fidelity_computes(tmp_path: Path) -> None:
    """Features and logits of torch-fidelity 0.4.0 with the same weights, of an image of 299 x 299.

    That network's figures in fp32 differ from those of fp64 by up to 1.4e-5.
    """
    torch.save(made_up_weights(), tmp_path / "weights.pth")
    network = load_inception(tmp_path / "weights.pth").double()
    image = (torch.arange(299 * 299 * 3) % 256).view(1, 299, 299, 3).permute(0, 3, 1, 2)
    with torch.inference_mode():
        features, logits = network(image.double() / 256)  # theirs scales by (x - 128) / 128
    assert (features.shape, logits.shape) == ((1, FEATURES), (1, CLASSES))
    found = features[0, [0, 400, 900, 1500, 2000]], logits[0, [0, 500, 1007]]
    theirs = [0.02901173, 0.07862333, 0.01604332, 0.09472035, 0.311665], [-0.2297612, 0.1170641, 0.01181054]
    for ours, figures in zip(found, theirs):
        torch.testing.assert_close(ours, torch.tensor(figures, dtype=torch.float64), rtol=0, atol=1.4e-5)


@pytest.mark.parametrize("kind", ["missing", "text", "another network", "a program"])
def test_another_file_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / ("weights.safetensors" if kind == "another network" else "weights.pth")
    if kind == "text":
        path.write_text("no weights")
    elif kind == "another network":
        save_file({"conv_in.weight": torch.zeros(3)}, path)
    elif kind == "a program":
        path.write_bytes(pickle.dumps(_Program(tmp_path / "ran"), protocol=2))
    with pytest.raises(FastsdError) as error:
        load_inception(path)
    assert error.value.path == path and "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


class _Program:
    """A pickle that makes a folder when it is read without restriction."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.mkdir, (str(self.path),)
