"""Where a batch job's images go: a folder, or whatever fsspec reaches (s3://, gs://, az://, sftp://)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from fastsd.errors import FastsdError
from fastsd.files import reason, remove_leftovers, write_whole


class Store(Protocol):
    """A place for files, by names such as "00012/00012345.png"."""

    def write(self, name: str, data: bytes) -> None:
        """Have a file of that name, which replaces one that is there.

        Raises:
            FastsdError: it cannot be written.
        """

    def lacks(self, names: Iterable[str]) -> set[str]:
        """Those of the names that are not there."""

    def is_empty(self) -> bool:
        """Nothing is there."""

    def remove_leftovers(self) -> None:
        """Remove files that killed processes had not given their names yet."""


class FolderStore:
    """A folder. A file gets its name when it is whole and on the disk.

    Args:
        argument: the flag that named it, for errors.
    """

    def __init__(self, folder: Path, argument: str = "--out"):
        self.folder, self.argument = folder, argument

    def write(self, name: str, data: bytes) -> None:
        """See `Store`."""
        path = self.folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, data, overwrite=True)
        except OSError as error:
            raise FastsdError(
                f"cannot write: {reason(error)}", argument=self.argument, path=str(self.folder)
            ) from error

    def lacks(self, names: Iterable[str]) -> set[str]:
        """See `Store`."""
        return {name for name in names if not (self.folder / name).is_file()}

    def is_empty(self) -> bool:
        """See `Store`."""
        return not self.folder.exists() or next(self.folder.iterdir(), None) is None

    def remove_leftovers(self) -> None:
        """See `Store`."""
        for folder in [self.folder, *self.folder.glob("[0-9]*/")]:
            remove_leftovers(folder)

    def __str__(self) -> str:
        return str(self.folder)


class UrlStore:
    """What a URL of fsspec names. A store of objects has each whole or not at all; elsewhere a kill may leave half a
    file, which no manifest names and the next run replaces.

    Raises:
        FastsdError: a protocol that nobody knows, a missing package, a place that cannot be reached.
    """

    def __init__(self, url: str):
        import fsspec

        self.url = url
        self._made: set[str] = set()  # folders
        with _named(url):
            self.files: Any
            self.files, self.root = fsspec.core.url_to_fs(url)

    def write(self, name: str, data: bytes) -> None:
        """See `Store`."""
        folder = str(PurePosixPath(self.root, name).parent)
        with _named(self.url):
            if folder not in self._made:
                self.files.makedirs(folder, exist_ok=True)
                self._made.add(folder)
            self.files.pipe_file(f"{self.root}/{name}", data)

    def lacks(self, names: Iterable[str]) -> set[str]:
        """See `Store`. Each folder is listed once."""
        lacking = set()
        for folder, group in groupby(sorted(names), lambda name: name.partition("/")[0]):
            there = set(self._list(f"{self.root}/{folder}"))
            lacking |= {name for name in group if PurePosixPath(name).name not in there}
        return lacking

    def is_empty(self) -> bool:
        """See `Store`."""
        return not self._list(self.root)

    def remove_leftovers(self) -> None:
        """See `Store`. There are none."""

    def __str__(self) -> str:
        return self.url

    def _list(self, folder: str) -> list[str]:
        with _named(self.url):
            try:
                return [PurePosixPath(path).name for path in self.files.ls(folder, detail=False)]
            except FileNotFoundError:
                return []


@contextmanager
def _named(url: str) -> Iterator[None]:
    """Errors inside become one that names the URL. Each of fsspec's packages has classes of errors of its own."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        said = reason(error) if isinstance(error, OSError) else str(error) or type(error).__name__
        raise FastsdError(said.splitlines()[0][:200], argument="--store", path=url) from error


def open_store(url: str) -> Store:
    """The store that a URL names; `file://` is a folder.

    Raises:
        FastsdError: it cannot be reached.
    """
    parts = urlsplit(url)
    if "://" not in url:
        raise FastsdError("it should be a URL: s3://bucket/folder, file:///folder", argument="--store", path=url)
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost") or len(parts.path) < 2:
            raise FastsdError("it should be file:///folder", argument="--store", path=url)
        return FolderStore(Path(unquote(parts.path)), "--store")
    return UrlStore(url)
