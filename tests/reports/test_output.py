"""What people reported of names for the output: endings that are no format, and folders with dots."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastsd.cli.output import Output
from fastsd.errors import FastsdError


@pytest.mark.parametrize("name", ["a.xyz", "a.tga", "a.jp2", "sub/a.mp4", "a.pngg", "a.JXR", "a.txt"])
def test_an_ending_that_is_no_format_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(FastsdError, match=r"\.png, \.jpg"):
        Output(tmp_path / name, 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["v1.5", "2024.11.28", "a.b", "a.xyz/", "outputs", ".hidden", "my.holidays"])
def test_folders_may_have_dots_in_their_names(name: str, tmp_path: Path) -> None:
    output = Output(f"{tmp_path}/{name}", 1)
    assert output.files is None and (tmp_path / name).is_dir()
    assert Output(tmp_path / name, 1).files is None  # a folder that exists is one, whatever its name


@pytest.mark.parametrize("name", ["a.png", "a.PNG", "a.jpg", "a.jpeg", "a.webp"])
def test_the_formats_that_are_written(name: str, tmp_path: Path) -> None:
    assert Output(tmp_path / name, 1).files == [tmp_path / name]
