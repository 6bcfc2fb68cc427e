"""What people reported of checkpoints that crashed, or were refused for the wrong reason, or read as something else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fastsd.cli import main
from fastsd.errors import FastsdError
from fastsd.image.files import read_text
from fastsd.image.metadata import read_texts
from fastsd.model.unet import UNet
from fastsd.pipeline import Pipeline
from fastsd.weights import load_folder, load_single_file, save_folder
from fastsd.weights.convert import convert
from tests.support import original
from tests.support.pipelines import PHOTO
from tests.support.tiny import all_weights, assert_same

Tensors = dict[str, torch.Tensor]
UNET = "model.diffusion_model."


@pytest.fixture(scope="module")
def tensors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensors]:
    """The tensors of a tiny single file of every family."""
    root = tmp_path_factory.mktemp("files")
    for family in original.FAMILIES:
        save_folder(original.components(family), root / family, torch.float32)
    return {family: original.file_tensors(root / family, family) for family in original.FAMILIES}


def file_of(tmp_path: Path, stored: Tensors) -> Path:
    save_file({key: value.contiguous() for key, value in stored.items()}, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_the_x4_upscaler_in_one_file_is_refused_by_name(tensors: dict[str, Tensors], tmp_path: Path) -> None:
    """It reads 7 channels and a noise level as a class (`label_emb.weight`); it used to load and die in oneDNN."""
    stored = dict(tensors["sd2"])
    first = stored[f"{UNET}input_blocks.0.0.weight"]
    stored[f"{UNET}input_blocks.0.0.weight"] = torch.randn(first.shape[0], 7, *first.shape[2:])
    stored[f"{UNET}label_emb.weight"] = torch.randn(1000, 256)
    with pytest.raises(FastsdError, match="it is Stable Diffusion's x4 upscaler; fastsd does not run it"):
        Pipeline.from_pretrained(file_of(tmp_path, stored), "cpu", "fp32")


def test_sd_turbo_in_one_file_loads_with_its_settings(tensors: dict[str, Tensors], tmp_path: Path) -> None:
    """sd_turbo.safetensors has SD 2's keys under `conditioner.embedders.0.model.`; its card: one step, guidance off."""
    pipe = Pipeline.from_pretrained(file_of(tmp_path, tensors["sd-turbo"]), "cpu", "fp32")
    assert pipe.defaults["num_inference_steps"] == 1 and pipe.defaults["guidance_scale"] == 1.0
    assert pipe.components.scheduler.timestep_spacing == "trailing"
    assert pipe("a cat", width=32, height=32, seed=1).images[0].size == (32, 32)


def test_a_projection_stored_as_a_layer_loads(tensors: dict[str, Tensors], tmp_path: Path) -> None:
    """SSD-1B, Vega and Playground 2: `text_projection.weight`, a Linear's, is the transpose of OpenCLIP's matrix."""
    prefix = "conditioner.embedders.1.model."
    stored = dict(tensors["sdxl"])
    stored[f"{prefix}text_projection.weight"] = stored.pop(f"{prefix}text_projection").T
    found = load_single_file(file_of(tmp_path, stored), torch.float32)
    save_file({key: value.contiguous() for key, value in tensors["sdxl"].items()}, tmp_path / "usual.safetensors")
    assert_same(all_weights(found), all_weights(load_single_file(tmp_path / "usual.safetensors", torch.float32)))
    convert(tmp_path / "model.safetensors", tmp_path / "folder")
    assert_same(all_weights(load_folder(tmp_path / "folder", torch.float32)), all_weights(found))


KINDS = {"sd1 InstructPix2Pix": 8, "sdxl InstructPix2Pix": 8, "sd2 depth": 5}


@pytest.mark.heavy
@pytest.mark.parametrize("name", KINDS)
def test_a_model_that_reads_an_image_works_from_one_file_and_repeats(
    name: str, tensors: dict[str, Tensors], tmp_path: Path, capsys: Any
) -> None:
    """InstructPix2Pix, CosXL Edit's shape and SD 2's depth model loaded and died in oneDNN.

    The file of the depth model also holds MiDaS. The image's metadata and A1111's text hold both scales.
    """
    family, kind = name.split(" ")
    stored = dict(tensors[family])
    first = stored[f"{UNET}input_blocks.0.0.weight"]
    stored[f"{UNET}input_blocks.0.0.weight"] = torch.randn(first.shape[0], KINDS[name], *first.shape[2:]) / 8
    if kind == "depth":
        stored["depth_model.model.pretrained.model.cls_token"] = torch.ones(1, 1, 8)
    file, photo = file_of(tmp_path, stored), tmp_path / "photo.png"
    PHOTO.resize((32, 32)).save(photo)
    image = ["--image" if kind == "InstructPix2Pix" else "--depth", str(photo)]
    words = ["-m", str(file), "-p", "make it blue", "--seed", "1", "--steps", "2", "--device", "cpu", "--dtype", "fp32"]
    words += ["--image-guidance", "1.25"] if kind == "InstructPix2Pix" else []
    assert main([*words, *image, "-o", str(tmp_path / "a.png")]) == 0, capsys.readouterr().err
    settings = read_texts(read_text(tmp_path / "a.png"))[0]
    assert settings.get("image_guidance_scale") == (1.25 if kind == "InstructPix2Pix" else None)
    assert ("Image CFG scale: 1.25" in read_text(tmp_path / "a.png")["parameters"]) == (kind == "InstructPix2Pix")
    assert main(["--from-image", str(tmp_path / "a.png"), "-o", str(tmp_path / "b.png")]) == 2
    assert f"it was generated with {image[0]} 'photo.png'" in capsys.readouterr().err
    assert main(["--from-image", str(tmp_path / "a.png"), *image, "-o", str(tmp_path / "b.png")]) == 0
    assert Image.open(tmp_path / "a.png").tobytes() == Image.open(tmp_path / "b.png").tobytes()
    assert main(["inspect", str(file)]) == 0
    shown = capsys.readouterr().out
    assert f"{original.FAMILIES[family].name} {kind} (" in shown and "depth_model" not in shown


@pytest.mark.parametrize("name", original.SMALLER)
def test_ssd_1b_and_vega_load_from_a_folder_and_from_one_file(name: str, tmp_path: Path) -> None:
    """Their UNets lack attention in the lowest level and blocks of other levels.

    Names of blocks: the key lists of the published files; their numbers: the published folders' configs.
    """
    components = replace(original.components("sdxl"), unet=UNet(original.SMALLER[name]))
    folder, file = tmp_path / "folder", tmp_path / "model.safetensors"
    save_folder(components, folder, torch.float32)
    convert(folder, file)
    unet = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
    expected, stored = original.unet_tensors(unet, original.SMALLER[name]), load_file(file)
    assert {key.removeprefix(UNET) for key in stored if key.startswith(UNET)} == set(expected)
    assert not any(key.startswith(f"{UNET}middle_block.1.") for key in stored)
    for loaded in (load_folder(folder, torch.float32), load_single_file(file, torch.float32)):
        assert loaded.unet.config == original.SMALLER[name]
        assert_same(all_weights(loaded), all_weights(components))
    convert(file, tmp_path / "back")
    assert load_folder(tmp_path / "back", torch.float32).unet.config == original.SMALLER[name]
    assert main(["inspect", str(file)]) == 0
