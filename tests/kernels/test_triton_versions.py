"""Every launch on sm_90 compiles, without spills, under the oldest Triton allowed and under the one installed here.

The oldest lies in a folder of the environment, where `make test` puts it; its version is the lower bound in
pyproject.toml.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

pytest.importorskip("triton", reason="no Triton for this platform")

from fastsd.kernels import dispatch
from tests.support.project import PYPROJECT, ROOT, dry_run

TRITON = next(found for found in map(Requirement, PYPROJECT["project"]["dependencies"]) if found.name == "triton")
OLDEST = next(bound.version for bound in TRITON.specifier if bound.operator == ">=")
FOLDER = Path(sys.prefix) / f".triton-{OLDEST}"


@pytest.mark.heavy
@pytest.mark.parametrize("which", ["oldest", "installed"])
def test_every_launch_compiles(which: str, tmp_path: Path) -> None:
    if which == "oldest" and not FOLDER.is_dir():
        install = f"pip install --no-deps --target {FOLDER} triton=={OLDEST}"
        pytest.skip(f"Triton {OLDEST} is not in {FOLDER}: `make test` puts it there, and so does {install}")
    path = [*([str(FOLDER)] if which == "oldest" else []), str(ROOT)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.launches"],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": os.pathsep.join(path), "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-8000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert Version(told["triton"]) == Version(OLDEST if which == "oldest" else version("triton"))
    assert not told["wrong"], "\n".join(told["wrong"])
    assert told["compiled"] > 100  # of three UNets, three text encoders and an autoencoder


def test_make_puts_the_oldest_triton_where_this_looks_for_it() -> None:
    installs = [line for line in dry_run("test") if "triton==" in line]
    assert len(installs) == 1 and f"triton=={OLDEST};" in installs[0]
    assert f"--target .venv/{FOLDER.name}.part" in installs[0]


def test_the_bounds_are_the_same_everywhere() -> None:
    assert ".".join(map(str, dispatch.OLDEST_TRITON)) == OLDEST
