"""Tiny models of every family, each as a folder and as a single file in the original layout."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastsd.weights import save_folder
from tests.support import original, tiny


class Originals:
    """`folder(family)`, `tensors(family)` and `file(family)`, each created once.

    A family is one of `original.FAMILIES`, also followed by a kind of `original.INPUTS`: "sd1 inpainting".
    """

    def __init__(self, root: Path):
        self.root = root
        self.folder = functools.cache(self._folder)
        self.tensors = functools.cache(self._tensors)
        self.file = functools.cache(self._file)

    def _folder(self, family: str) -> Path:
        name, _, kind = family.partition(" ")
        save_folder(original.components(name, kind), self.root / family, torch.float32)
        return self.root / family

    def _tensors(self, family: str) -> dict[str, torch.Tensor]:
        return original.file_tensors(self.folder(family), family.split(" ")[0])

    def _file(self, family: str) -> Path:
        return self.save(self.tensors(family), f"{family}.safetensors")

    def save(self, tensors: dict[str, torch.Tensor], name: str, metadata: dict[str, str] | None = None) -> Path:
        save_file(tensors, self.root / name, metadata)
        return self.root / name


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Originals:
    return Originals(tmp_path_factory.mktemp("originals"))


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `tiny.sd1`, not to be changed."""
    path = tmp_path_factory.mktemp("saved") / "sd1"
    save_folder(tiny.sd1(), path, torch.float32)
    return path


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of `saved` to change."""
    shutil.copytree(saved, tmp_path / "sd1")
    return tmp_path / "sd1"
