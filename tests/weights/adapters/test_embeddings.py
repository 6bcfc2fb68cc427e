"""Textual inversion files: the three forms, and one line for each defect."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fastsd.config import CLIPConfig
from fastsd.errors import FastsdError
from fastsd.model.clip import TextEncoder
from fastsd.weights.adapters.embeddings import load_embedding, read_bundled
from fastsd.weights.formats.safetensors_file import TensorEntry


def encoder(width: int) -> TextEncoder:
    return TextEncoder(CLIPConfig(vocab_size=8, hidden_size=width, num_attention_heads=1, num_hidden_layers=1))


SD1 = (encoder(16),)
SDXL = (encoder(16), encoder(24))
REFINER = (encoder(24),)


def vectors(count: int = 3, width: int = 16) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(count))


def a1111(values: torch.Tensor, parameter: bool = True) -> dict[str, Any]:
    """What A1111's trainer saves."""
    return {
        "string_to_token": {"*": torch.tensor(265)},
        "string_to_param": {"*": nn.Parameter(values) if parameter else values},
        "name": "another name",
        "step": 500,
        "sd_checkpoint": "81761151",
        "sd_checkpoint_name": "v1-5",
    }


@pytest.mark.parametrize("parameter", [True, False])
def test_a1111(tmp_path: Path, parameter: bool) -> None:
    torch.save(a1111(vectors(), parameter), tmp_path / "ink-style.pt")
    found = load_embedding(tmp_path / "ink-style.pt", SD1, allow_pickle=True)
    assert found.names == ("ink-style",)
    assert len(found.vectors) == 1 and torch.equal(found.vectors[0], vectors())
    assert not found.vectors[0].requires_grad


@pytest.mark.parametrize("ending", [".safetensors", ".bin"])
@pytest.mark.parametrize("shape", [(16,), (1, 16), (3, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_key(tmp_path: Path, ending: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    path = tmp_path / f"learned_embeds{ending}"
    (save_file if ending == ".safetensors" else torch.save)({"<cat-toy>": values}, path)
    found = load_embedding(path, SD1, allow_pickle=True)
    assert found.names == ("learned_embeds", "<cat-toy>")
    assert torch.equal(found.vectors[0], values.float().reshape(-1, 16))
    assert load_embedding(path, SD1, token="my toy", allow_pickle=True).names == ("my toy",)


def test_a_key_that_is_not_a_token(tmp_path: Path) -> None:
    save_file({"emb_params": vectors()}, tmp_path / "ink.safetensors")
    assert load_embedding(tmp_path / "ink.safetensors", SD1).names == ("ink",)


def test_sdxl(tmp_path: Path) -> None:
    path = tmp_path / "xl.safetensors"
    save_file({"clip_g": vectors(2, 24), "clip_l": vectors(2, 16)}, path)
    found = load_embedding(str(path), SDXL)
    assert found.names == ("xl",)
    assert torch.equal(found.vectors[0], vectors(2, 16)) and torch.equal(found.vectors[1], vectors(2, 24))
    (second,) = load_embedding(path, REFINER).vectors
    assert torch.equal(second, vectors(2, 24))


class Command:
    """Would run a command when it is unpickled."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.trace}",)


def compressed(path: Path) -> None:
    """What torch.save wrote, compressed: 4 MB of zeros in a few kB."""
    torch.save({"x": torch.zeros(2**20)}, path)
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def shortened(path: Path) -> None:
    torch.save({"x": vectors()}, path)
    path.write_bytes(path.read_bytes()[:-100])


BAD: dict[str, tuple[str, Callable[[Path], Any], tuple[TextEncoder, ...], str]] = {
    "missing": ("x.pt", lambda path: None, SD1, "no such file"),
    "folder": ("x.pt", lambda path: path.mkdir(), SD1, "not a file"),
    "ending": ("x.ckpt", lambda path: path.write_bytes(b""), SD1, "ends in .safetensors, .pt, .bin"),
    "empty": ("x.pt", lambda path: path.write_bytes(b""), SD1, "torch.save"),
    "empty safetensors": ("x.safetensors", lambda path: path.write_bytes(b""), SD1, "safetensors"),
    "text": ("x.bin", lambda path: path.write_text("<html>"), SD1, "a web page"),
    "pickle": ("x.pt", lambda path: path.write_bytes(pickle.dumps({"x": 1})), SD1, "torch.save"),
    "code": ("x.pt", lambda path: torch.save({"x": Command(path.parent / "trace")}, path), SD1, "refers to .*system"),
    "compressed": ("x.pt", compressed, SD1, "compressed"),
    "shortened": ("x.pt", shortened, SD1, "torch.save"),
    "list": ("x.pt", lambda path: torch.save([vectors()], path), SD1, "not an embedding"),
    "no tensors": ("x.pt", lambda path: torch.save({"x": 1}, path), SD1, "0 tensors"),
    "params": ("x.pt", lambda path: torch.save({"string_to_param": 3}, path), SD1, "string_to_param"),
    "many": ("x.safetensors", lambda path: save_file({k: vectors() for k in "abcd"}, path), SD1, "4 tensors"),
    "stride": ("x.pt", lambda path: torch.save({"x": torch.zeros(1).expand(10**12, 16)}, path), SD1, "has strides"),
    "width": ("x.safetensors", lambda path: save_file({"x": vectors(1, 24)}, path), SD1, r"\[1, 24\].*\[n, 16\]"),
    "sdxl in sd1": (
        "x.safetensors",
        lambda path: save_file({"clip_l": vectors(1, 16), "clip_g": vectors(1, 24)}, path),
        SD1,
        "another family",
    ),
    "sd1 in sdxl": ("x.safetensors", lambda path: save_file({"x": vectors()}, path), SDXL, "another family"),
    "half": ("x.safetensors", lambda path: save_file({"clip_g": vectors(1, 24)}, path), SDXL, "clip_l is missing"),
    "uneven": (
        "x.safetensors",
        lambda path: save_file({"clip_l": vectors(1, 16), "clip_g": vectors(2, 24)}, path),
        SDXL,
        "as many for one text encoder as for the other",
    ),
    "nothing": ("x.safetensors", lambda path: save_file({"x": torch.zeros(0, 16)}, path), SD1, "1 to 75"),
    "long": ("x.safetensors", lambda path: save_file({"x": torch.zeros(76, 16)}, path), SD1, "1 to 75"),
    "nan": ("x.safetensors", lambda path: save_file({"x": torch.full((1, 16), torch.nan)}, path), SD1, "finite"),
    "whole numbers": ("x.safetensors", lambda path: save_file({"x": torch.ones(1, 16).long()}, path), SD1, "finite"),
    "scalar": ("x.safetensors", lambda path: save_file({"x": torch.tensor(1.0)}, path), SD1, "another family"),
}


@pytest.mark.parametrize("case", BAD)
def test_each_defect_is_one_line(tmp_path: Path, case: str) -> None:
    name, write, encoders, reason = BAD[case]
    write(tmp_path / name)
    with pytest.raises(FastsdError, match=reason) as caught:
        load_embedding(tmp_path / name, encoders, allow_pickle=True)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / name)) and "\n" not in message
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("ending", [".pt", ".bin"])
def test_pickles_are_read_only_if_allowed(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"x{ending}"
    torch.save({"x": vectors()}, path)
    with pytest.raises(FastsdError, match="allow_pickle"):
        load_embedding(path, SD1)


def test_a_large_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(FastsdError, match="1024 MB"):
        load_embedding(path, SD1)


def test_a_bundled_tensor_larger_than_any_embedding_is_refused_unread() -> None:
    path = Path("no such file")  # reading it would fail
    entry = TensorEntry(path, torch.float32, (2**30, 32), 0, 2**37, "bundle_emb.toy.*")
    with pytest.raises(FastsdError, match="larger than any embedding"):
        read_bundled(path, {"*": entry}, SD1)
