"""Folders of Hugging Face `datasets`: Arrow files that `save_to_disk` writes, or Parquet files. Nothing is decoded
here."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastsd.errors import FastsdError
from fastsd.image.files import MAX_BYTES
from fastsd.train.sources import Sample
from fastsd.weights.formats.json_file import read_json

CAPTIONS = ("text", "caption", "captions", "prompt")
SPLIT = "train"


def list_dataset(folder: Path, caption: str = "") -> list[Sample]:
    """The rows of a data set: the column of its images, and that of its captions, `CAPTIONS`, or else the names of its
    classes. Of several splits, "train" is read. Images without a caption have `caption`.

    Raises:
        FastsdError: pyarrow is missing; no such files, no images, no captions, or a damaged file.
    """
    try:
        import pyarrow
    except ImportError:
        raise FastsdError(
            "needs pyarrow: pip install 'fastsd[datasets]'", argument="data.kind", value="datasets"
        ) from None
    parts = _split(folder)
    arrow, parquet = sorted(parts.glob("*.arrow")), sorted(parts.rglob("*.parquet"))
    if not arrow and not parquet:
        raise FastsdError(
            "no .arrow or .parquet file; data.path should be what save_to_disk wrote, or a folder of Parquet files",
            path=parts,
        )
    samples: list[Sample] = []
    names = _classes(parts)
    try:
        for path in arrow or [path for path in parquet if SPLIT in path.name] or parquet:
            samples += _rows(ArrowFile(path) if arrow else ParquetRows(path), names, caption)
    except pyarrow.ArrowException as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise FastsdError(f"damaged, or no such file ({first:.100})", path=path) from error
    if not any(sample.captions for sample in samples):
        raise FastsdError(
            f"{len(samples)} images but no captions: no column {', '.join(CAPTIONS)}, and no classes with names;"
            " data.caption is one for all",
            path=parts,
        )
    return samples


def _split(folder: Path) -> Path:
    """The folder of the split, where a data set has several."""
    if not folder.is_dir():
        raise FastsdError("no such folder; data.path should be a folder of a Hugging Face data set", path=folder)
    listing = folder / "dataset_dict.json"
    if not listing.is_file():
        return folder
    splits = read_json(listing).get("splits", [])
    if SPLIT not in splits or not (folder / SPLIT).is_dir():
        raise FastsdError(f"has no split {SPLIT!r}; name the folder of one of its splits", path=folder)
    return folder / SPLIT


def _classes(folder: Path) -> dict[str, list[str]]:
    """The names of the classes, by column."""
    path = folder / "dataset_info.json"
    if not path.is_file():
        return {}
    features = read_json(path).get("features")
    found = {}
    for column, feature in (features if isinstance(features, dict) else {}).items():
        names = feature.get("names") if isinstance(feature, dict) else None
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            found[column] = names
    return found


class ArrowFile:
    """A file of Arrow's stream format, mapped into memory: only what is asked for is read."""

    def __init__(self, path: Path):
        import pyarrow

        self.path = path
        with pyarrow.memory_map(str(path)) as source:
            self._table = pyarrow.ipc.open_stream(source).read_all()
        self.schema = self._table.schema

    def column(self, name: str) -> list[Any]:
        """All values of a column that is no image."""
        return self._table.column(name).to_pylist()

    def __len__(self) -> int:
        return self._table.num_rows

    def value(self, name: str, row: int) -> Any:
        """One value."""
        return self._table.column(name)[row].as_py()


class ParquetRows:
    """A Parquet file. A row's image comes with its whole group of rows, of which the last one is kept."""

    def __init__(self, path: Path):
        from pyarrow import parquet

        self.path, self._lock = path, threading.Lock()
        self._file = parquet.ParquetFile(path)
        self.schema = self._file.schema_arrow
        sizes = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
        self._places = [(group, row) for group, size in enumerate(sizes) for row in range(size)]
        self._kept: tuple[int, str, Any] = (-1, "", None)

    def column(self, name: str) -> list[Any]:
        """All values of a column that is no image."""
        return self._file.read(columns=[name]).column(name).to_pylist()

    def __len__(self) -> int:
        return len(self._places)

    def value(self, name: str, row: int) -> Any:
        """One value."""
        group, place = self._places[row]
        with self._lock:  # images are decoded on several threads
            if self._kept[:2] != (group, name):
                self._kept = (group, name, self._file.read_row_group(group, columns=[name]).column(name))
            return self._kept[2][place].as_py()


def _rows(file: ArrowFile | ParquetRows, classes: dict[str, list[str]], caption: str) -> Iterator[Sample]:
    import pyarrow

    def is_image(kind: Any) -> bool:
        return pyarrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0

    columns = {field.name: field.type for field in file.schema}
    images = [name for name, kind in columns.items() if is_image(kind)]
    if not images:
        raise FastsdError(f"no column of images; it has {', '.join(columns)}", path=file.path)
    image = "image" if "image" in images else images[0]
    texts = next((name for name in CAPTIONS if name in columns), "")
    labels = next((name for name in classes if name in columns), "")
    values = file.column(texts or labels) if texts or labels else [None] * len(file)
    for row, value in enumerate(values):
        if not texts and isinstance(value, int):
            value = classes[labels][value] if 0 <= value < len(classes[labels]) else None
        found = value if isinstance(value, list) else [value]
        captions = tuple(text.strip() for text in found if isinstance(text, str) and text.strip())
        yield Sample(f"{file.path.name}[{row}]", captions or ((caption,) if caption else ()), _reader(file, image, row))


def _reader(file: ArrowFile | ParquetRows, column: str, row: int) -> Callable[[], bytes]:
    def read() -> bytes:
        value = file.value(column, row)
        content = value.get("bytes") if isinstance(value, dict) else None
        if content is None:
            raise FastsdError("the row holds no image, at most its path; embed the images in the data set")
        if len(content) > MAX_BYTES:
            raise FastsdError(f"{len(content) / 2**20:.0f} MiB; at most {MAX_BYTES // 2**20} MiB are read")
        return content

    return read
