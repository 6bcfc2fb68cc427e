"""The facts that `fastsd inspect` prints about a file."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastsd.cli import main
from fastsd.image.files import read_text
from tests.support import original


def facts(path: Path, capsys: Any, *flags: str) -> dict[str, list[str]]:
    """Values by name; a line without a name continues the one before."""
    assert main(["inspect", str(path), *flags]) == 0
    values: dict[str, list[str]] = {}
    name = ""
    for line in capsys.readouterr().out.splitlines():
        head, colon, value = line.partition(":")
        if line.startswith(" ") or not colon:
            values[name].append(line.strip())
        else:
            name = head
            values[name] = [value.strip()]
    return values


@pytest.mark.parametrize("family", [*original.FAMILIES, "sdxl inpainting", "sd1 InstructPix2Pix", "sd2 depth"])
def test_families(originals: Any, family: str, capsys: Any) -> None:
    found = facts(originals.file(family), capsys)
    name, _, kind = family.partition(" ")
    assert found["family"][0].startswith(f"{original.FAMILIES[name].name} {kind}".strip() + " (")
    assert found["missing keys"] == found["extra keys"] == found["wrong shapes"] == ["none"]
    assert found["dtype"] == ["F32 100%"]
    assert found["EMA"] == ["no"] and found["autoencoder"] == ["in the file"]
    assert str(len(originals.tensors(family))) + " tensors" in found["size"][0]


def test_the_prediction_type_and_its_reason(originals: Any, capsys: Any) -> None:
    tensors = originals.tensors("sd2")
    assert facts(originals.file("sd2"), capsys)["prediction"][0].startswith(
        "unknown, set it with --prediction (SD 2 was"
    )
    marked = originals.save(tensors | {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}, "i.safetensors")
    found = facts(marked, capsys)
    assert found["prediction"] == ["v_prediction (the file holds the marker key v_pred)"]
    assert found["zero SNR"] == ["yes (marker key ztsnr)"] and found["extra keys"] == ["none"]
    stated = originals.save(tensors, "s.safetensors", {"modelspec.prediction_type": "epsilon", "author": "A\nB"})
    found = facts(stated, capsys)
    assert found["prediction"] == ["epsilon (its metadata says so (modelspec.prediction_type))"]
    assert sorted(found["metadata"]) == ["author = A\\nB", "modelspec.prediction_type = epsilon"]


def test_missing_extra_and_wrong_keys(originals: Any, capsys: Any) -> None:
    tensors = dict(originals.tensors("sd1"))
    del tensors["model.diffusion_model.out.2.bias"]
    tensors["model.diffusion_model.out.0.bias"] = torch.ones(31)
    tensors |= {f"stranger.{i:02}": torch.ones(1) for i in range(12)}
    tensors |= {"model_ema.decay": torch.ones(()), "betas": torch.ones(3)}
    found = facts(originals.save(tensors, "keys.safetensors"), capsys)
    assert found["missing keys"] == ["model.diffusion_model.out.2.bias"]
    assert found["wrong shapes"] == ["model.diffusion_model.out.0.bias [31]"]
    assert found["extra keys"] == [f"stranger.{i:02}" for i in range(10)] + ["and 2 more"]
    assert found["EMA"] == ["in the file; --ema uses it"]


def test_hashes(tmp_path: Path, originals: Any, capsys: Any) -> None:
    """A1111's short hash is the first ten digits of the file's SHA-256; its older one covers 64 KiB from 1 MiB on."""
    found = facts(originals.file("sd1"), capsys)
    raw = originals.file("sd1").read_bytes()
    assert len(raw) > 0x110000
    assert found["sha256"] == [hashlib.sha256(raw).hexdigest()]
    assert found["short hash"] == [hashlib.sha256(raw).hexdigest()[:10]]
    assert found["legacy hash"] == [hashlib.sha256(raw[0x100000:0x110000]).hexdigest()[:8]]


def test_half_precision_and_a_missing_autoencoder(originals: Any, capsys: Any) -> None:
    bare = {k: v.half() for k, v in originals.tensors("sd1").items() if not k.startswith("first_stage")}
    key = "model.diffusion_model.out.2.bias"
    found = facts(originals.save(bare | {key: bare[key].bfloat16()}, "halves.safetensors"), capsys)
    assert found["dtype"] == ["F16 100%, BF16 0%"]
    assert found["autoencoder"] == ["not in the file; add one with --vae"]


def test_a_file_that_is_not_a_checkpoint(originals: Any, capsys: Any) -> None:
    path = originals.save({"lora_unet_x.lora_down.weight": torch.ones(4, 4)}, "lora.safetensors", {"ss_steps": "3"})
    found = facts(path, capsys)
    assert found["kind"] == ["an adapter: LoRA; use it with --lora"] and "family" not in found
    assert found["metadata"] == ["ss_steps = 3"]


def test_pickles_only_if_allowed(tmp_path: Path, originals: Any, capsys: Any) -> None:
    torch.save({"state_dict": originals.tensors("sd1")}, tmp_path / "x.ckpt")
    assert main(["inspect", str(tmp_path / "x.ckpt")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--allow-pickle" in error
    assert facts(tmp_path / "x.ckpt", capsys, "--allow-pickle")["family"][0].startswith("SD 1 (")


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_folder(originals: Any, family: str, capsys: Any) -> None:
    folder = originals.folder(family)
    found = facts(folder, capsys)
    files = list(folder.rglob("*.safetensors"))
    assert found["size"][0].startswith(f"{sum(file.stat().st_size for file in files)} bytes")
    assert found["missing keys"] == found["extra keys"] == found["wrong shapes"] == ["none"]
    assert found["unet"][0].endswith(" parameters in diffusion_pytorch_model.safetensors")
    assert ("text_encoder_2" in found) == found["family"][0].endswith("as SDXL") == (family == "sdxl")


def test_a_folder_whose_keys_do_not_fit(originals: Any, tmp_path: Path, capsys: Any) -> None:
    shutil.copytree(originals.folder("sd1"), tmp_path / "model")
    file = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["conv_out.bias"]
    save_file(tensors | {"conv_norm_out.bias": torch.ones(31), "stranger": torch.ones(1)}, file)
    found = facts(tmp_path / "model", capsys)
    assert found["missing keys"] == ["unet/conv_out.bias"] and found["extra keys"] == ["unet/stranger"]
    assert found["wrong shapes"] == ["unet/conv_norm_out.bias [31]"]


def test_a_bundled_model_by_its_name(capsys: Any) -> None:
    found = facts(Path("digits"), capsys)
    assert found["prediction"][0].startswith("v_prediction") and found["zero SNR"] == ["yes"]
    assert found["size of images"] == ["64 x 64 in training"] and found["dtype"] == ["F16 100%"]
    assert "num_inference_steps = 25" in found["defaults"]


def test_an_image_holds_the_hash_of_an_inspected_model(originals: Any, capsys: Any, tmp_path: Path) -> None:
    """Only `inspect` reads the whole file; generating an image does not compute the hash."""
    file = originals.save(originals.tensors("sd1"), "hashed.safetensors")

    def text(*words: object) -> str:
        base = "-p x -s 1 --steps 1 -W 64 -H 64 --overwrite -o".split()
        assert main([*base, str(tmp_path / "a.png"), *map(str, words)]) == 0
        capsys.readouterr()
        return read_text(tmp_path / "a.png")["parameters"]

    digits = hashlib.sha256(file.read_bytes()).hexdigest()[:10]
    assert "Size: 64x64, Model: hashed, VAE: hashed.safetensors, " in text("-m", file, "--vae", file)
    assert facts(file, capsys)["short hash"] == [digits]
    assert f"Model hash: {digits}, Model: hashed, VAE hash: {digits}, VAE: hashed.safetensors, " in (
        text("-m", file, "--vae", file)
    )
