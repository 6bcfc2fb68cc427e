"""Where a batch job's images go: a folder, or whatever fsspec reaches (s3://, gs://, az://, sftp://)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from fastsd.errors import FastsdError
from fastsd.files import reason, remove_leftovers, write_whole

SMALL = 2**16  # bytes


class Store(Protocol):
    """A place for files, by names such as "00012/00012345.png"."""

    def write(self, name: str, data: bytes) -> None:
        """Have a file of that name, which replaces one that is there.

        Raises:
            FastsdError: it cannot be written.
        """

    def lacks(self, names: Iterable[str]) -> set[str]:
        """Those of the names that are not there."""

    def read(self, name: str) -> bytes | None:
        """A small file, of at most `SMALL` bytes; None: it is not there.

        Raises:
            FastsdError: it cannot be read.
        """

    def names(self) -> list[str]:
        """Those of the files and folders that are there, without what is in folders."""

    def remove(self, name: str) -> None:
        """Have no file of that name.

        Raises:
            FastsdError: it cannot be removed.
        """

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
            raise self._failed("cannot write", error) from error

    def lacks(self, names: Iterable[str]) -> set[str]:
        """See `Store`."""
        return {name for name in names if not (self.folder / name).is_file()}

    def read(self, name: str) -> bytes | None:
        """See `Store`."""
        try:
            with (self.folder / name).open("rb") as file:
                return file.read(SMALL)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._failed(f"cannot read {name}", error) from error

    def names(self) -> list[str]:
        """See `Store`."""
        return os.listdir(self.folder) if self.folder.exists() else []

    def remove(self, name: str) -> None:
        """See `Store`."""
        try:
            (self.folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise self._failed(f"cannot remove {name}", error) from error

    def remove_leftovers(self) -> None:
        """See `Store`."""
        for folder in [self.folder, *self.folder.glob("[0-9]*/")]:
            remove_leftovers(folder)

    def __str__(self) -> str:
        return str(self.folder)

    def _failed(self, doing: str, error: OSError) -> FastsdError:
        return FastsdError(f"{doing}: {reason(error)}", argument=self.argument, path=str(self.folder))


class UrlStore:
    """What a URL of fsspec names. A store of objects has each whole or not at all; elsewhere a kill may leave half a
    file, which no manifest names and the next run replaces.

    Attributes:
        root: the place in fsspec's words: "bucket/folder" in a store of objects, "/folder" elsewhere.

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
            self.files.invalidate_cache()  # fsspec keeps listings, and others write to the place
        if self._has_buckets and "" in self.root.split("/"):
            raise FastsdError(
                f"it should be {urlsplit(url).scheme}://bucket/folder, without empty parts",
                argument="--store",
                path=url,
            )

    @property
    def _has_buckets(self) -> bool:
        """Whether it is a store of objects: folders need not be made there, and fsspec would make a bucket too."""
        return not self.root.startswith("/")

    def write(self, name: str, data: bytes) -> None:
        """See `Store`."""
        folder = str(PurePosixPath(self.root, name).parent)
        with _named(self.url, "cannot write: "):
            if not self._has_buckets and folder not in self._made:
                self.files.makedirs(folder, exist_ok=True)
                self._made.add(folder)
            try:
                self.files.pipe_file(f"{self.root}/{name}", data)
            except FileNotFoundError as error:
                if not self._has_buckets:
                    raise
                said = f"there is no bucket {self.root.split('/')[0]!r}; make it, or name another"
                raise FastsdError(said, argument="--store", path=self.url) from error

    def lacks(self, names: Iterable[str]) -> set[str]:
        """See `Store`. Each folder is listed once."""
        lacking = set()
        for folder, group in groupby(sorted(names), lambda name: name.partition("/")[0]):
            there = set(self._list(f"{self.root}/{folder}"))
            lacking |= {name for name in group if PurePosixPath(name).name not in there}
        return lacking

    def read(self, name: str) -> bytes | None:
        """See `Store`."""
        with _named(self.url, f"cannot read {name}: "):
            try:
                with self.files.open(f"{self.root}/{name}", "rb") as file:
                    return bytes(file.read(SMALL))
            except FileNotFoundError:
                return None

    def names(self) -> list[str]:
        """See `Store`."""
        return self._list(self.root)

    def remove(self, name: str) -> None:
        """See `Store`."""
        with _named(self.url, f"cannot remove {name}: "), contextlib.suppress(FileNotFoundError):
            self.files.rm_file(f"{self.root}/{name}")

    def remove_leftovers(self) -> None:
        """See `Store`. There are none."""

    def __str__(self) -> str:
        return self.url

    def _list(self, folder: str) -> list[str]:
        """The names in a folder. Consoles of stores of objects mark an empty folder by an object of its name."""
        with _named(self.url, "cannot list: "):
            try:
                paths = self.files.ls(folder, detail=False)
            except FileNotFoundError:
                return []
        return [PurePosixPath(path).name for path in paths if path.rstrip("/") != folder]


@contextlib.contextmanager
def _named(url: str, doing: str = "") -> Iterator[None]:
    """Errors inside become one that names the URL. Each of fsspec's packages has classes of errors of its own.

    Args:
        doing: what the message begins with.
    """
    try:
        yield
    except FastsdError:
        raise
    except Exception as error:
        said = reason(error) if isinstance(error, OSError) else str(error) or type(error).__name__
        said = said.splitlines()[0][:200].rstrip(".")
        raise FastsdError(f"{doing}{said}", argument="--store", path=url) from error


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
