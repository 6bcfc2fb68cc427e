"""Standard output that cannot be written: the images are saved all the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.project import ROOT


def test_a_reader_that_has_gone(model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fastsd", "-p", "x", "-m", model, "--count", "3", "-b", "1"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, cwd=tmp_path, env=env, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")
    assert len(list((tmp_path / "outputs").iterdir())) == 3  # only their names are lost


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("buffered", ["", "1"])
@pytest.mark.parametrize("words", ["-p x -m MODEL", "--help", "inspect MODEL"])
def test_standard_output_that_cannot_be_written(model: Path, tmp_path: Path, words: str, buffered: str) -> None:
    command = [sys.executable, "-m", "fastsd", *words.replace("MODEL", str(model)).split()]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": buffered}
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=tmp_path, env=env, stdout=full, stderr=subprocess.PIPE, check=False)
    said = b"fastsd: error: standard output cannot be written: the disk is full\n"
    assert (done.returncode, done.stderr) == (1, said)
    assert len(list(tmp_path.rglob("*.png"))) == ("-p" in words)


def test_no_standard_output(model: Path, tmp_path: Path) -> None:
    """A daemon's program may have none."""
    command = [sys.executable, "-m", "fastsd", "-p", "x", "-m", str(model), "--count", "2", "-b", "1"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = ["sh", "-c", 'exec "$@" >&-', "sh", *command]
    done = subprocess.run(words, cwd=tmp_path, env=env, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert len(list(tmp_path.rglob("*.png"))) == 2
