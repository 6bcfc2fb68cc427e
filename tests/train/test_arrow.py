"""Folders of Hugging Face data sets, as `save_to_disk` and `to_parquet` write them."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastsd.errors import FastsdError
from fastsd.train.arrow import list_dataset
from fastsd.train.captioned import CaptionedImages
from fastsd.train.settings import Data


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


def table(**columns: list[Any]) -> Any:
    """Five images, whose red is 10 times their row, in the form of the feature `Image`."""
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is heavy: pip install 'fastsd[datasets]'")
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    images = pyarrow.array([{"bytes": png(10 * row), "path": None} for row in range(5)], kind)
    return pyarrow.table({"image": images, **columns})


def write_stream(path: Path, rows: Any) -> None:
    import pyarrow

    path.parent.mkdir(parents=True, exist_ok=True)
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, rows.schema) as stream:
        stream.write_table(rows, max_chunksize=2)


TEXTS = [f"number {row}" for row in range(5)]


def reds(folder: Path, **settings: Any) -> list[int]:
    data = Data(str(folder), kind="datasets", resolution=8, **settings)
    images = CaptionedImages(list_dataset(folder), data, 8, print)
    pixels = images.pixels(np.arange(len(images)), np.random.default_rng(0))[0]
    return [round((float(x) + 1) * 127.5) for x in pixels[:, 0, 0, 0]]


def test_what_save_to_disk_wrote(tmp_path: Path) -> None:
    """A dictionary of splits, each of several files; the training split is read, image by image."""
    rows = table(text=TEXTS)
    write_stream(tmp_path / "train" / "data-00000-of-00002.arrow", rows.slice(0, 3))
    write_stream(tmp_path / "train" / "data-00001-of-00002.arrow", rows.slice(3))
    write_stream(tmp_path / "test" / "data-00000-of-00001.arrow", rows.slice(0, 1))
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    samples = list_dataset(tmp_path)
    assert [sample.captions for sample in samples] == [(text,) for text in TEXTS]
    assert reds(tmp_path) == [0, 10, 20, 30, 40]


def test_parquet_files_in_groups_of_rows(tmp_path: Path) -> None:
    rows = table(caption=[[text, text.upper()] for text in TEXTS])
    from pyarrow import parquet

    parquet.write_table(rows, tmp_path / "train-00000.parquet", row_group_size=2)
    parquet.write_table(rows.slice(0, 1), tmp_path / "test-00000.parquet")
    assert list_dataset(tmp_path)[4].captions == ("number 4", "NUMBER 4")
    assert reds(tmp_path, memory_gb=0.0) == [0, 10, 20, 30, 40]


def test_classes_are_captions(tmp_path: Path) -> None:
    write_stream(tmp_path / "data.arrow", table(label=[0, 1, 1, 0, 7]))
    info = {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}, "image": {"_type": "Image"}}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    assert [sample.captions for sample in list_dataset(tmp_path)] == [("cat",), ("dog",), ("dog",), ("cat",), ()]


def test_an_image_that_is_only_a_path_is_left_out(tmp_path: Path) -> None:
    rows = table(text=TEXTS)
    import pyarrow

    images = rows.column("image").to_pylist()
    images[1] = {"bytes": None, "path": "/etc/passwd"}
    kind = rows.schema.field("image").type
    write_stream(tmp_path / "data.arrow", rows.set_column(0, "image", pyarrow.array(images, kind)))
    assert reds(tmp_path, max_bad=1.0) == [0, 20, 30, 40]


def test_what_is_missing_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_stream(tmp_path / "bare" / "data.arrow", table())
    with pytest.raises(FastsdError, match="5 images but no captions"):
        list_dataset(tmp_path / "bare")
    assert list_dataset(tmp_path / "bare", "a dot")[0].captions == ("a dot",)
    write_stream(tmp_path / "numbers" / "data.arrow", table(text=TEXTS).select(["text"]))
    with pytest.raises(FastsdError, match="no column of images; it has text"):
        list_dataset(tmp_path / "numbers")
    (tmp_path / "bad").mkdir()
    with pytest.raises(FastsdError, match=r"no .arrow or .parquet file"):
        list_dataset(tmp_path / "bad")
    for name in ("data.arrow", "data.parquet"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_bytes(b"nothing of the kind" * 9)
        with pytest.raises(FastsdError, match="damaged, or no such file"):
            list_dataset(tmp_path / name)


def test_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(FastsdError, match=r"needs pyarrow: pip install 'fastsd\[datasets\]'"):
        list_dataset(tmp_path)
