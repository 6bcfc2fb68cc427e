"""Networks that do not fit together are refused alike from a folder, from a single file, and in converting."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsd.cli import main
from fastsd.errors import FastsdError
from fastsd.weights import load_folder, load_single_file
from fastsd.weights.convert import convert
from fastsd.weights.layouts.family import find_family
from fastsd.weights.layouts.fit import check_fit
from tests.support import original
from tests.support.folders import edit_json

FP32 = torch.float32
UNET, VAE = "model.diffusion_model.", "first_stage_model."
RUNS = {4: "", 5: "depth", 8: "image", 9: "mask"}
NAMED = {3: "pixels", 7: "x4 upscaler", 12: "try-on", 13: "try-on", 16: "16 channels"}


def with_inputs(originals: Any, family: str, width: int) -> dict[str, torch.Tensor]:
    """A single file's tensors with a UNet that reads `width` channels."""
    tensors = dict(originals.tensors(family))
    first = tensors[f"{UNET}input_blocks.0.0.weight"]
    tensors[f"{UNET}input_blocks.0.0.weight"] = torch.randn(first.shape[0], width, *first.shape[2:])
    return tensors


def copied(originals: Any, tmp_path: Path) -> Path:
    """A folder of SD 1 to change."""
    return Path(shutil.copytree(originals.folder("sd1"), tmp_path / "folder"))


@pytest.mark.parametrize("width", range(1, 17))
@pytest.mark.parametrize("family", original.FAMILIES)
def test_every_input_width_is_run_or_named(family: str, width: int) -> None:
    """What the loaders call, for every number of channels that a UNet may read."""
    tiny = original.FAMILIES[family]
    texts = [config for _, _, config in tiny.texts]
    unet = replace(tiny.unet, in_channels=width)
    if width in RUNS:
        check_fit(Path("x"), unet, tiny.vae, texts, family == "refiner")
        assert unet.reads == RUNS[width]
        return
    with pytest.raises(FastsdError, match=f"its UNet reads {width} channels.*; fastsd runs") as error:
        check_fit(Path("x"), unet, tiny.vae, texts, family == "refiner")
    assert NAMED.get(width, "") in str(error.value)


@pytest.mark.parametrize("width", [3, 7, 10])
def test_a_folder_and_a_file_are_refused_alike(originals: Any, width: int, tmp_path: Path, capsys: Any) -> None:
    """By loading, inspecting and converting: a width that nothing here reads."""
    path = originals.save(with_inputs(originals, "sd1", width), f"{width}.safetensors")
    found = []
    for act in (lambda: load_single_file(path, FP32), lambda: convert(path, tmp_path / "out")):
        with pytest.raises(FastsdError, match=rf"^{re.escape(str(path))}: its UNet reads {width} ") as error:
            act()
        found.append(str(error.value).removeprefix(str(path)))
    folder = copied(originals, tmp_path)
    edit_json(folder / "unet/config.json", in_channels=width)
    for act in (lambda: load_folder(folder, FP32), lambda: convert(folder, tmp_path / "out.safetensors")):
        with pytest.raises(FastsdError, match=rf"^{re.escape(str(folder))}: ") as error:
            act()
        found.append(str(error.value).removeprefix(str(folder)))
    assert len(set(found)) == 1 and not (tmp_path / "out").exists() and not (tmp_path / "out.safetensors").exists()
    assert main(["inspect", str(path)]) == 0
    assert f"its UNet reads {width} channels" in capsys.readouterr().out


FITS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "other latents": ({}, {"latent_channels": 8}, "its UNet gives 4 channels, its autoencoder's latents have 8"),
    "16 channels": ({}, {"latent_channels": 16}, "its UNet gives 4 channels, its autoencoder's latents have 16"),
    "variances too": ({"out_channels": 8}, {}, "its UNet gives 8 channels, its autoencoder's latents have 4"),
    "depth beside colour": ({}, {"in_channels": 6, "out_channels": 6}, "its autoencoder reads 6 channels and gives 6"),
    "another text": ({"cross_attention_dim": 96}, {}, "its text encoders give 64 features, its UNet reads 96"),
}


@pytest.mark.parametrize("reason", FITS)
def test_networks_of_different_families(reason: str) -> None:
    unet, vae, message = FITS[reason]
    tiny = original.FAMILIES["sd1"]
    with pytest.raises(FastsdError, match=f"^x: {message}"):
        check_fit(
            Path("x"),
            replace(tiny.unet, **unet),
            replace(tiny.vae, **vae),
            [config for _, _, config in tiny.texts],
            False,
        )


def test_latents_of_more_channels_fit() -> None:
    """A UNet and an autoencoder that agree are run, whatever their latents."""
    tiny = original.FAMILIES["sd1"]
    for channels, wide in ((8, 8), (16, 16), (8, 17)):
        unet = replace(tiny.unet, in_channels=wide, out_channels=channels)
        vae = replace(tiny.vae, latent_channels=channels)
        check_fit(Path("x"), unet, vae, [config for _, _, config in tiny.texts], False)


OTHER_FILES = {
    "the x4 upscaler": ("sd2", f"{UNET}label_emb.weight", (1000, 256), "it is Stable Diffusion's x4 upscaler"),
    "unCLIP": ("sd2", "embedder.model.visual.proj", (64, 64), "it is SD 2 unCLIP"),
    "videos": ("sd2", f"{UNET}input_blocks.1.0.time_stack.in_layers.0.weight", (64,), "it is Stable Video Diffusion"),
    "Zero123": ("sd1", "cc_projection.weight", (64, 68), "it is Zero123"),
    "boxes": ("sd1", f"{UNET}position_net.linears.0.weight", (8, 8), "it is GLIGEN"),
}


@pytest.mark.parametrize("kind", OTHER_FILES)
def test_a_file_of_another_kind_is_named(originals: Any, kind: str, tmp_path: Path, capsys: Any) -> None:
    family, key, shape, message = OTHER_FILES[kind]
    tensors = originals.tensors(family) | {key: torch.ones(shape)}
    with pytest.raises(FastsdError, match=f"^x: {message}.*; fastsd does not run it"):
        find_family(Path("x"), {name: tuple(value.shape) for name, value in tensors.items()}, {})
    path = originals.save(tensors, f"{kind}.safetensors")
    assert main(["inspect", str(path)]) == 0
    assert f"family: {message}" in re.sub(" +", " ", capsys.readouterr().out)
    with pytest.raises(FastsdError, match=message):
        convert(path, tmp_path / "out")


OTHER_FOLDERS = {
    "StableDiffusionUpscalePipeline": "it is Stable Diffusion's x4 upscaler",
    "StableVideoDiffusionPipeline": "it is Stable Video Diffusion",
    "MarigoldDepthPipeline": "it is Marigold",
    "KolorsPipeline": "it is Kolors",
    "FluxPipeline": "it is Flux",
}


@pytest.mark.parametrize("name", OTHER_FOLDERS)
def test_a_folder_of_another_kind_is_named(originals: Any, name: str, tmp_path: Path) -> None:
    folder = copied(originals, tmp_path)
    edit_json(folder / "model_index.json", _class_name=name)
    with pytest.raises(FastsdError, match=rf"{OTHER_FOLDERS[name]}.*\({name}\); fastsd does not run it"):
        load_folder(folder, FP32)
