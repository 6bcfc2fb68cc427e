"""What a user gets by installing: the public face, the files in the package, and pins that fit the requirements."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastsd

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PINS = [
    line.split(";")[0].strip()
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line.strip() and not line.startswith("#")
]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_public_face() -> None:
    assert set(fastsd.__all__) <= set(dir(fastsd))
    assert issubclass(fastsd.FastsdError, ValueError)
    assert re.fullmatch(r"\d+\.\d+\.\d+", fastsd.__version__)
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = fastsd.nothing_like_it


def test_pipeline_is_handed_out_on_demand() -> None:
    from fastsd.pipeline import Pipeline

    assert fastsd.Pipeline is Pipeline


def test_version_has_a_changelog_entry() -> None:
    assert f"## {fastsd.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_data_file_is_packaged() -> None:
    """A wheel holds .py files and what package-data names; a file that neither covers would be missing there."""
    package = ROOT / "fastsd"
    packaged = {
        path for pattern in PROJECT["tool"]["setuptools"]["package-data"]["fastsd"] for path in package.glob(pattern)
    }
    data = {
        path
        for path in package.rglob("*")
        if path.is_file() and path.suffix not in {".py", ".pyc"} and "__pycache__" not in path.parts
    }
    assert data and not data - packaged
    assert package / "assets" / "clip_vocab" / "LICENSE" in packaged


def test_every_requirement_is_pinned() -> None:
    """Each direct requirement has an exact pin that it allows, so that two set-ups of one commit are the same."""
    from packaging.requirements import Requirement

    pins = {canonical(name): version for name, version in (pin.split("==") for pin in PINS)}
    project = PROJECT["project"]
    wanted = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    for requirement in map(Requirement, wanted):
        assert canonical(requirement.name) in pins, f"{requirement} has no pin in constraints.txt"
        assert requirement.specifier.contains(pins[canonical(requirement.name)], prereleases=True), requirement


def test_make_never_installs_an_unpinned_torch() -> None:
    """The first package that pip is asked for is torch by its exact pin, before anything that depends on it."""
    env = {key: value for key, value in os.environ.items() if key not in {"MAKEFLAGS", "MAKELEVEL", "NOVENV", "PYTHON"}}
    command = ["make", "--dry-run", "--always-make", "--no-print-directory", ".venv/.dev"]
    try:
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    except FileNotFoundError:
        pytest.skip("make is not installed here")
    installs = [line for line in done.stdout.splitlines() if "pip install" in line]
    assert [line.split("constraints.txt ")[1] for line in installs] == [
        next(pin for pin in PINS if pin.startswith("torch==")),
        "-e .",
        "-e '.[dev]'",
    ]
