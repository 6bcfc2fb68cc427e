"""The project's own files: pyproject.toml, and the commands that `make` would run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
# The oldest Triton that the package allows, and where `make test` puts it.
_TRITON = next(found for found in map(Requirement, PYPROJECT["project"]["dependencies"]) if found.name == "triton")
OLDEST_TRITON = next(bound.version for bound in _TRITON.specifier if bound.operator == ">=")
TRITON_FOLDER = Path(sys.prefix) / f".triton-{OLDEST_TRITON}"
INHERITED = {"MAKEFLAGS", "MAKELEVEL", "NOVENV", "PYTHON", "VENV"}  # what a make above this one hands down


def dry_run(target: str) -> list[str]:
    """The commands of `make target` on a fresh machine, a line each."""
    environment = {name: value for name, value in os.environ.items() if name not in INHERITED}
    command = ["make", "--dry-run", "--always-make", "--no-print-directory", target]
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    except FileNotFoundError:
        pytest.skip("make is not installed here")
    return done.stdout.splitlines()
