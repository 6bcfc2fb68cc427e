"""Autoencoders outside a checkpoint, in every form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastsd.errors import FastsdError
from fastsd.weights import load_folder, load_vae
from tests.support.tiny import assert_same

FP32 = torch.float32


@pytest.mark.parametrize("form", ["original", "original with prefix", "diffusers", "folder", "checkpoint", "ckpt"])
def test_every_form_of_an_autoencoder(originals: Any, form: str, tmp_path: Path) -> None:
    """The weights are those of the file plus 1; the latent scale is SDXL's."""
    original = {
        key.removeprefix("first_stage_model."): value + 1
        for key, value in originals.tensors("sdxl").items()
        if key.startswith("first_stage_model.")
    }
    folder = {
        key: value + 1
        for key, value in load_file(originals.folder("sdxl") / "vae/diffusion_pytorch_model.safetensors").items()
    }
    path = tmp_path / "vae.safetensors"
    if form == "original":
        save_file(original, path)
    elif form == "original with prefix":
        save_file({f"vae.{key}": value for key, value in original.items()}, path)
    elif form == "diffusers":
        save_file(folder, path)
    elif form == "checkpoint":
        save_file({f"first_stage_model.{key}": value for key, value in original.items()}, path)
    elif form == "ckpt":
        path = tmp_path / "vae.ckpt"
        torch.save({"state_dict": original}, path)
    else:
        path = tmp_path / "vae"
        path.mkdir()
        save_file(folder, path / "diffusion_pytorch_model.safetensors")
        (path / "config.json").write_bytes((originals.folder("sdxl") / "vae/config.json").read_bytes())
    expected = load_folder(originals.folder("sdxl"), FP32).vae
    vae = load_vae(path, True, FP32, allow_pickle=form == "ckpt")
    assert_same(dict(vae.state_dict()), {key: value + 1 for key, value in expected.state_dict().items()})
    assert vae.config == expected.config


def test_a_file_that_is_not_an_autoencoder(originals: Any) -> None:
    with pytest.raises(FastsdError, match=r"none\.safetensors: not an autoencoder"):
        load_vae(originals.save({"x": torch.ones(1)}, "none.safetensors"), False, FP32)
