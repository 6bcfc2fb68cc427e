"""IDX files and WebDataset shards as lists of samples."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastsd.errors import FastsdError
from fastsd.train.packed import list_idx, list_shards
from tests.support.training import write_idx


def png(colour: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (4, 4), colour).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("packed", [True, False])
def test_idx_files(tmp_path: Path, packed: bool) -> None:
    images = np.random.default_rng(0).integers(256, size=(5, 6, 7), dtype=np.uint8)
    for name, array in (("images-idx3", images), ("labels-idx1", np.arange(5).astype(np.uint8))):
        path = tmp_path / f"train-{name}-ubyte.gz"
        write_idx(path, array)
        if not packed:
            path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
            path.unlink()
    samples = list_idx(tmp_path)
    assert [sample.captions for sample in samples] == [(str(n),) for n in range(5)]
    for sample, image in zip(samples, images):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(sample.read()))), image)


def test_idx_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FastsdError, match="no \\*-images-idx3-ubyte file here"):
        list_idx(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(b"\0\0\x08\x03" + b"\xff" * 12)  # sizes far beyond the file
    with pytest.raises(FastsdError, match="not an IDX file"):
        list_idx(tmp_path)


def test_shards(tmp_path: Path) -> None:
    first = {
        "a/0.png": png(0),
        "a/0.txt": b"zero\n\nnull\n",
        "a/1.png": png(1),
        "a/1.json": b'{"text": ["one", "eins"]}',
    }
    second = {
        "2.png": png(2),
        "2.json": b'{"caption": "two"}',
        "3.png": png(3),
        "3.json": b"{",
        "notes.md": b"no image",
    }
    write_tar(tmp_path / "0.tar", first)
    write_tar(tmp_path / "1.tar", second)
    samples = list_shards(tmp_path)
    assert [s.captions for s in samples] == [("zero", "null"), ("one", "eins"), ("two",), ()]
    assert [s.name for s in samples] == ["0.tar/a/0.png", "0.tar/a/1.png", "1.tar/2.png", "1.tar/3.png"]
    assert [s.read() for s in samples] == [png(n) for n in range(4)]
    assert [s.captions for s in list_shards(tmp_path, "a number")][-1] == ("a number",)
    assert [s.name for s in list_shards(tmp_path / "1.tar")] == ["1.tar/2.png", "1.tar/3.png"]


def test_captions_in_shards_are_utf_8(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {"0.png": png(0), "0.txt": "\ufeffcaf\u00e9".encode()})
    assert list_shards(tmp_path)[0].captions == ("caf\u00e9",)
    write_tar(tmp_path / "0.tar", {"0.png": png(0), "0.txt": "caf\u00e9".encode("latin-1")})
    with pytest.raises(FastsdError, match=r"0\.tar: 0\.txt: captions should be UTF-8"):
        list_shards(tmp_path)


def test_shards_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FastsdError, match="no .tar file here"):
        list_shards(tmp_path)
    path = tmp_path / "0.tar"
    path.write_bytes(b"no tar" * 200)
    with pytest.raises(FastsdError, match=r"0\.tar: not a plain tar file"):
        list_shards(tmp_path)
    write_tar(path, {"0.txt": b"a"})
    with pytest.raises(FastsdError, match="no images in 1 shards"):
        list_shards(path)
    write_tar(path, {"0.png": png(0), "0.json": json.dumps({"text": 3}).encode()})
    with pytest.raises(FastsdError, match="1 images but no captions"):
        list_shards(path)
