"""The user's cache folder, and files that are written whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from fastsd.errors import FastsdError


def cache_folder() -> Path:
    """Where fastsd keeps what it measured on this machine.

    $FASTSD_CACHE, else $XDG_CACHE_HOME/fastsd, else ~/.cache/fastsd. The folder may not exist yet.

    Raises:
        FastsdError: there is none of these, as for a user without a home folder.
    """
    if os.environ.get("FASTSD_CACHE"):
        return Path(os.environ["FASTSD_CACHE"])
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastsd"
    except RuntimeError as error:
        raise FastsdError("this user has no home folder: set FASTSD_CACHE to a folder for what is measured") from error


def fingerprint(data: bytes) -> str:
    """SHA-256 of a file's bytes, in hexadecimal, to recognise the file again."""
    return hashlib.sha256(data).hexdigest()


def reason(error: OSError) -> str:
    """The operating system's error in plain words."""
    if error.errno == errno.ENOENT:
        return "no such file or folder"
    if is_full(error):
        return "the disk is full"
    return (error.strerror or str(error) or type(error).__name__).lower()


def is_full(error: BaseException) -> bool:
    """Whether an error says that a disk, or what its user may have of it, is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))


def check_path(path: str | Path) -> None:
    """Refuse a path that cannot be looked up, such as one with a name that is too long, and a URL; it need not exist.

    Raises:
        FastsdError: it says why.
    """
    if path == "":  # the current folder, as a `Path`
        raise FastsdError("the path is empty")
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        if re.match(r"https?:/", str(path), re.IGNORECASE):  # a `Path` has one slash
            raise FastsdError("URLs are not fetched; download the file and give its path", path=path) from None
    except OSError as error:
        raise FastsdError(reason(error), path=path) from error
    except ValueError as error:  # a null character
        raise FastsdError(str(error), path=repr(str(path))) from error


def write_whole(path: Path, data: bytes, overwrite: bool = False) -> None:
    """Write `data` so that `path` never holds a part of it. Raises as `open_whole` does."""
    with open_whole(path, overwrite) as file:
        file.write(data)


_HIDDEN = ".fastsd-"


def remove_leftovers(folder: Path) -> None:
    """Remove the hidden files that killed processes left in `folder`; no other process may be writing there."""
    for path in folder.glob(f"{_HIDDEN}*.tmp"):
        path.unlink(missing_ok=True)


@contextmanager
def open_whole(path: Path, overwrite: bool = False) -> Iterator[BinaryIO]:
    """A file to write, which gets its name `path` only when it is complete and on the disk.

    The bytes go to a hidden file in the same folder. Neither a kill nor a loss of power leaves half a file.

    Raises:
        FileExistsError: the name is taken, and `overwrite` is not set.
        OSError: it cannot be written; nothing is left behind.
    """
    temporary = path.with_name(f"{_HIDDEN}{secrets.token_hex(6)}.tmp")
    # Not by `tempfile`, whose files only their owner may read.
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    try:
        with open(os.open(temporary, flags, 0o666), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if overwrite:
            os.replace(temporary, path)
        else:
            _name_new(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


@contextmanager
def replace_whole(target: Path, folder: bool = False) -> Iterator[Path]:
    """A path beside `target` to write a file or a folder to; it becomes `target` when the context ends without error.

    What stood there before comes back where the exchange fails.

    Args:
        folder: the path is an empty folder; otherwise the caller makes a file of that name.

    Raises:
        OSError: it cannot be written; `target` is then as it was.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name[:100]}.", dir=target.parent))
    new, old = scratch / "new", scratch / "old"
    try:
        if folder:
            new.mkdir()
        yield new
        if folder and target.exists():
            target.rename(old)
        try:
            os.replace(new, target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _name_new(temporary: Path, path: Path) -> None:
    """Give `temporary` the name `path`, which must be free. A link fails where the name is taken."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links: take the name, then replace the empty file
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        try:
            os.replace(temporary, path)
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def _sync_folder(folder: Path) -> None:
    """Write a folder's entries to the disk: a new name survives a power cut only then."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(opened)
    except OSError:
        pass  # some network file systems cannot
    finally:
        os.close(opened)
