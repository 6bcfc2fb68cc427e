"""A job that is killed with SIGKILL at any moment goes on: nothing is lost, nothing is done twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastsd.batch.manifest import LOCK, NAME
from fastsd.files import fingerprint

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")


def killed(tmp_path: Path, model: Path, lines: int, *how: object) -> list[int]:
    """How the runs ended."""
    asked = "".join(json.dumps({"prompt": f"image {k}"}) + "\n" for k in range(lines))
    (tmp_path / "prompts.jsonl").write_text(asked)
    words = ["batch", "prompts.jsonl", "--out", "out", "-m", str(model), "-b", "1", "--seed", "7"]
    command = [sys.executable, "-m", "tests.support.killed", *map(str, how), *words]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1200)
    assert ran.returncode == 0, ran.stderr
    return [int(code) for code in ran.stdout.splitlines()[-1].split()[1:]]


def check(folder: Path, lines: int) -> dict[int, Any]:
    """Each line once in the manifest, with files that are those which it names, and no other file."""
    records = [json.loads(line) for line in (folder / NAME).read_text().splitlines()[1:]]
    assert sorted(record["line"] for record in records) == list(range(1, lines + 1))
    files = {one["path"]: one["sha256"] for record in records for one in record["files"]}
    there = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    assert there.keys() == {*files, NAME, LOCK}
    assert {name: fingerprint(there[name].read_bytes()) for name in files} == files
    return {record["line"]: record["files"] for record in records}


@pytest.mark.heavy
def test_kills_at_each_kind_of_write(tmp_path: Path, model: Path) -> None:
    """The manifest's first line (before and after it has its name), an image, its folder, its line."""
    codes = killed(tmp_path, model, 4, "writes", "1,2,1,2,3,4,2")
    assert codes == [-9] * 7 + [0]
    files = check(tmp_path / "out", 4)
    (tmp_path / "whole").mkdir()
    assert killed(tmp_path / "whole", model, 4, "writes", "1000") == [0, 0]
    assert check(tmp_path / "whole" / "out", 4) == files


@pytest.mark.slow
def test_fifty_kills_at_any_moment(tmp_path: Path, model: Path) -> None:
    codes = killed(tmp_path, model, 40, "moments", 50, 1.0)
    assert codes.count(-9) == 50 and codes[-1] == 0
    folders = sorted(tmp_path.glob("out*"))
    found = [check(folder, 40) for folder in folders]
    assert all(files == found[0] for files in found)
