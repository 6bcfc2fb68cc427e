from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

import pytest

from fastsd.errors import FastsdError
from fastsd.server.catalogue import Catalogue
from fastsd.server.settings import ServerSettings


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("sd15.safetensors", "anime/sd15.safetensors", "anime/other.safetensors", "x.ckpt", "note.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "xl" / "unet").mkdir(parents=True)
    (tmp_path / "xl" / "model_index.json").write_text("{}")
    (tmp_path / "xl" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    return tmp_path


def names(catalogue: Catalogue) -> list[str]:
    return [one.name for one in catalogue.models]


def test_checkpoints_and_folders_are_listed_and_no_pickles_nor_parts_of_folders(folder: Path) -> None:
    assert names(Catalogue(ServerSettings(models_dir=str(folder)))) == [
        "digits",
        "xl",
        "anime/other",
        "anime/sd15",
        "sd15",
    ]


def test_the_first_model_is_listed_once(folder: Path) -> None:
    catalogue = Catalogue(ServerSettings(models_dir=str(folder), model=str(folder / "anime" / "other.safetensors")))
    assert names(catalogue) == ["anime/other", "xl", "anime/sd15", "sd15"]
    outside = Catalogue(ServerSettings(model=str(folder / "sd15.safetensors")))
    assert names(outside) == ["sd15"]


def test_a_model_is_found_by_every_way_to_name_it(folder: Path) -> None:
    catalogue = Catalogue(ServerSettings(models_dir=str(folder)))
    asyncio.run(catalogue.hash_files())
    digest = hashlib.sha256(b"anime/other.safetensors").hexdigest()
    for name in (
        "anime/other",
        "anime/other.safetensors",
        "other",
        "OTHER",
        digest,
        digest[:10],
        f"anime/other.safetensors [{digest[:10]}]",
    ):
        assert catalogue.find_model(name).path == folder / "anime" / "other.safetensors", name
    assert catalogue.find_model("sd15").path == folder / "sd15.safetensors"  # its own name precedes one at its end


@pytest.mark.parametrize("name", ["", "../secret", "/etc/passwd", "x.ckpt", "note.txt", "xl/unet", "sd15\0", "anime"])
def test_a_name_that_is_not_listed_finds_nothing(folder: Path, name: str) -> None:
    with pytest.raises(FastsdError, match="no such model is listed"):
        Catalogue(ServerSettings(models_dir=str(folder))).find_model(name)


def test_new_files_are_found_after_a_refresh(folder: Path) -> None:
    catalogue = Catalogue(ServerSettings(models_dir=str(folder)))
    (folder / "new.safetensors").write_bytes(b"new")
    assert "new" not in names(catalogue)
    catalogue.refresh()
    assert "new" in names(catalogue)


def test_folders_and_files_that_are_links_are_listed_and_a_circle_ends(tmp_path: Path) -> None:
    """Models often lie on another disk."""
    disk, models = tmp_path / "disk", tmp_path / "models"
    (disk / "sd15").mkdir(parents=True)
    (disk / "sd15" / "model_index.json").write_text("{}")
    (disk / "one.safetensors").write_bytes(b"one")
    models.mkdir()
    (models / "disk").symlink_to(disk)
    (models / "two.safetensors").symlink_to(disk / "one.safetensors")
    (models / "gone.safetensors").symlink_to(tmp_path / "gone.safetensors")
    (disk / "again").symlink_to(models)
    names = [one.name for one in Catalogue(ServerSettings(models_dir=str(models))).models]
    assert sorted(names) == ["digits", "disk/one", "disk/sd15", "two"]


def test_models_that_are_called_alike_have_names_of_their_own(folder: Path) -> None:
    """Beside the bundled one, a folder beside a file, and the first model from elsewhere."""
    for name in ("digits", "anime/other"):
        (folder / name).mkdir()
        (folder / name / "model_index.json").write_text("{}")
    above = folder.name
    catalogue = Catalogue(ServerSettings(models_dir=str(folder)))
    assert sorted(names(catalogue)) == sorted(
        ["digits", f"{above}/digits", "anime/other", "anime/other.safetensors", "anime/sd15", "sd15", "xl"]
    )
    for one in catalogue.models:
        assert catalogue.find_model(one.name) is one and catalogue.find_model(one.title) is one
    assert catalogue.find_model("digits").path is None
    outside = folder.parent / "sd15.safetensors"
    outside.write_bytes(b"another")
    catalogue = Catalogue(ServerSettings(models_dir=str(folder), model=str(outside)))
    assert catalogue.find_model("sd15").path == outside
    assert catalogue.find_model(f"{above}/sd15").path == folder / "sd15.safetensors"


def test_a_file_that_is_replaced_has_another_hash(folder: Path) -> None:
    catalogue = Catalogue(ServerSettings(models_dir=str(folder)))
    asyncio.run(catalogue.hash_files())
    (folder / "sd15.safetensors").write_bytes(b"other weights")
    catalogue.refresh()
    assert catalogue.find_model("sd15").sha256 is None
    asyncio.run(catalogue.hash_files())
    assert catalogue.find_model("sd15").sha256 == hashlib.sha256(b"other weights").hexdigest()
