"""Files are written whole or not at all, and nothing is replaced unasked."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from fastsd.errors import FastsdError
from fastsd.files import cache_folder, check_path, replace_whole, write_whole
from fastsd.files.hashes import known_sha256, remember_sha256


def test_paths_that_cannot_be_looked_up(tmp_path: Path) -> None:
    check_path(tmp_path)
    check_path(tmp_path / "none")
    (tmp_path / "file").touch()
    check_path(tmp_path / "file" / "none")
    for name, message in (("a" * 300, "name too long"), ("a\0b", "null")):
        with pytest.raises(FastsdError, match=message):
            check_path(tmp_path / name)
    with pytest.raises(FastsdError, match="the path is empty"):
        check_path("")


def test_a_user_without_a_home_folder_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("FASTSD_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    with pytest.raises(FastsdError, match="set FASTSD_CACHE"):
        cache_folder()
    assert known_sha256(Path(__file__)) is None
    remember_sha256(Path(__file__), "0" * 64)  # it stays unknown


def test_writing_never_replaces_unasked(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    write_whole(path, b"first")
    with pytest.raises(FileExistsError):
        write_whole(path, b"second")
    assert path.read_bytes() == b"first"
    write_whole(path, b"third", overwrite=True)
    assert path.read_bytes() == b"third"
    assert os.listdir(tmp_path) == ["a.png"]


def test_a_new_file_is_readable_as_any_other(tmp_path: Path) -> None:
    write_whole(tmp_path / "a.png", b"x")
    (tmp_path / "b").touch()
    assert (tmp_path / "a.png").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", no_links)
    path = tmp_path / "a.png"
    write_whole(path, b"first")
    with pytest.raises(FileExistsError):
        write_whole(path, b"second")
    assert path.read_bytes() == b"first" and os.listdir(tmp_path) == ["a.png"]


@pytest.mark.parametrize("failing", ["fsync", "link", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, error: BaseException
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(os, failing, fail)
    if failing == "link":
        monkeypatch.setattr(os, "replace", fail)  # what is tried where links do not work
    with pytest.raises(type(error)):
        write_whole(tmp_path / "a.png", b"x", overwrite=failing == "replace")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("folder", [False, True])
def test_what_stood_there_stays_where_the_new_one_fails(tmp_path: Path, folder: bool) -> None:
    target = tmp_path / "model"
    target.mkdir() if folder else target.write_bytes(b"old")
    with pytest.raises(RuntimeError), replace_whole(target, folder) as new:
        (new / "x" if folder else new).write_bytes(b"half")
        raise RuntimeError
    assert os.listdir(tmp_path) == ["model"]
    assert os.listdir(target) == [] if folder else target.read_bytes() == b"old"


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FASTSD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("FASTSD_CACHE")
    assert cache_folder() == tmp_path / "xdg" / "fastsd"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "fastsd"
