"""Names of images, and places that cannot be written."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from PIL import Image

from fastsd.cli.output import Output
from fastsd.errors import FastsdError


def gradient() -> Image.Image:
    return Image.linear_gradient("L")


def test_names_in_a_folder_count_on(tmp_path: Path) -> None:
    (tmp_path / "00007-1-old.png").touch()
    (tmp_path / "notes.txt").touch()
    output = Output(tmp_path, 3)
    names = [output.save(gradient(), seed, prompt, {}).name for seed, prompt in ((5, "A cat, (a:1.2)/../x"), (6, "猫"))]
    assert names == ["00008-5-a-cat-a-1-2-x.png", "00009-6-猫.png"]
    (tmp_path / "00010-7.png").write_bytes(b"another program's")
    assert output.save(gradient(), 7, "!?", {}).name == "00011-7.png"
    assert (tmp_path / "00010-7.png").read_bytes() == b"another program's"
    assert len(Output(tmp_path, 1).save(gradient(), 1, "\U0001d54f" * 300 + "猫" * 300, {}).name.encode()) < 200


def test_several_images_to_one_file_name(tmp_path: Path) -> None:
    output = Output(tmp_path / "new" / "a.webp", 2)
    assert [output.save(gradient(), 1, "x", {}).name for _ in range(2)] == ["a-0.webp", "a-1.webp"]
    with pytest.raises(FastsdError, match=r"a-1\.webp.*overwrite replaces"):
        (tmp_path / "new" / "a-0.webp").unlink()
        Output(tmp_path / "new" / "a.webp", 2)
    Output(tmp_path / "new" / "a.webp", 2, overwrite=True)


def test_an_output_that_cannot_be_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "taken-1.png").mkdir()
    for where, said in {
        "file": "neither a folder",
        "file/a.png": "cannot write",
        "a.gif": "not written; use .png",
        "link.png": "exists already",
        "x" * 300 + ".png": "cannot write",
        "new/" + "x" * 300: "cannot write",
    }.items():
        with pytest.raises(FastsdError, match=said) as caught:
            Output(tmp_path / where, 1)
        assert caught.value.argument == "output" and "\n" not in str(caught.value)
    with pytest.raises(FastsdError, match="a folder of this name"):
        Output(tmp_path / "folder.png" / ".." / "taken.png", 2)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.png", "link.png", "taken-1.png"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(FastsdError, match="permission denied"):
        Output(tmp_path, 1)


def test_giving_up_removes_only_what_was_made(tmp_path: Path) -> None:
    output = Output(tmp_path / "a" / "b", 1)
    assert (tmp_path / "a" / "b").is_dir()
    output.remove_empty_folders()
    assert os.listdir(tmp_path) == []
    (tmp_path / "a").mkdir()
    output = Output(tmp_path / "a" / "b", 1)
    output.save(gradient(), 1, "x", {})
    output.remove_empty_folders()
    assert len(os.listdir(tmp_path / "a" / "b")) == 1


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = Output(tmp_path / "a.png", 1)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FastsdError, match="the disk is full") as caught:
        output.save(gradient(), 1, "x", {})
    assert caught.value.argument == "output" and os.listdir(tmp_path) == []
