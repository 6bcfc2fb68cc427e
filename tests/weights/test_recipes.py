"""The recipes of docs/checkpoints.md, followed: a model family and a single-file layout are one row each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsd.config import SD_VAE, SchedulerConfig
from fastsd.errors import FastsdError
from fastsd.model.unet import UNet
from fastsd.model.vae import AutoencoderKL
from fastsd.weights import load_folder, load_single_file, load_vae, save_folder
from fastsd.weights.convert import convert
from fastsd.weights.inspect import inspect
from fastsd.weights.layouts import family as family_module
from fastsd.weights.layouts import file_layouts, vae_file
from fastsd.weights.layouts.file_layouts import FILE_LAYOUTS, FileLayout, TextEncoderLayout
from tests.support import original
from tests.support.tiny import all_weights, assert_same

FP32 = torch.float32
SD1 = next(row for row in FILE_LAYOUTS if row.family == "SD 1")


def add_row(monkeypatch: pytest.MonkeyPatch, row: FileLayout) -> None:
    """What adding a row to `FILE_LAYOUTS` does, for the modules that import it."""
    for module in (file_layouts, family_module, vae_file):
        monkeypatch.setattr(module, "FILE_LAYOUTS", (*FILE_LAYOUTS, row))


def test_other_sizes_need_no_code(tmp_path: Path) -> None:
    """A model that differs from its family only in widths and depths, as a folder and as a file."""
    unet = replace(
        original.FAMILIES["sd1"].unet, block_out_channels=(32, 96), transformer_layers_per_block=(2, 1),
        mid_transformer_layers=1, num_attention_heads=(8, 8),
    )  # fmt: skip
    components = replace(original.components("sd1"), unet=UNet(unet))
    save_folder(components, tmp_path / "folder", FP32)
    convert(tmp_path / "folder", tmp_path / "file.safetensors")
    for loaded in (load_folder(tmp_path / "folder", FP32), load_single_file(tmp_path / "file.safetensors", FP32)):
        assert loaded.unet.config == unet
        assert_same(all_weights(loaded), all_weights(components))


def test_a_model_family_is_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A family with a latent scale, a prediction type, a sampler and a size of its own."""
    base = original.components("sd1")
    components = replace(
        base,
        vae=AutoencoderKL(replace(base.vae.config, scaling_factor=0.5)),
        scheduler=SchedulerConfig(prediction_type="v_prediction", sampler="euler"),
        sample_size=96,
    )
    folder, file = tmp_path / "folder", tmp_path / "file.safetensors"
    save_folder(components, folder, FP32)
    assert load_folder(folder, FP32).scheduler == components.scheduler  # a folder's configs state everything
    with pytest.raises(FastsdError, match=r"cannot store that its autoencoder has scaling_factor 0\.5"):
        convert(folder, file)
    row = replace(
        SD1,
        family="Tiny",
        texts=(TextEncoderLayout("text_encoder", "text."),),
        vae=replace(SD_VAE, scaling_factor=0.5),
        prediction="v_prediction",
        sampler="euler",
        sample_size=96,
    )
    add_row(monkeypatch, row)
    assert convert(folder, file) == []  # the file omits nothing that its readers would not assume
    loaded = load_single_file(file, FP32)
    assert_same(all_weights(loaded), all_weights(components))
    assert (loaded.vae.config, loaded.scheduler) == (components.vae.config, components.scheduler)
    assert loaded.sample_size == 96
    assert dict(inspect(file))["family"].startswith("Tiny (")
    convert(file, tmp_path / "back")
    assert_same(all_weights(load_folder(tmp_path / "back", FP32)), all_weights(components))


def test_a_layout_with_other_prefixes_is_one_row(originals: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """SD 1 under the names of another program; the autoencoder of such a file works as --vae, too."""
    prefixes = {
        SD1.unet_prefix: "net.unet.",
        SD1.vae_prefix: "net.vae.",
        SD1.texts[0].prefix: "net.text.",
    }
    tensors = {}
    for key, value in originals.tensors("sd1").items():
        old = next(prefix for prefix in prefixes if key.startswith(prefix))
        tensors[prefixes[old] + key.removeprefix(old)] = value
    file = originals.save(tensors, "other prefixes.safetensors")
    with pytest.raises(FastsdError, match="not a Stable Diffusion checkpoint"):
        load_single_file(file, FP32)
    row = replace(
        SD1,
        texts=(TextEncoderLayout("text_encoder", "net.text."),),
        unet_prefix="net.unet.",
        vae_prefix="net.vae.",
    )
    add_row(monkeypatch, row)
    loaded, expected = load_single_file(file, FP32), load_folder(originals.folder("sd1"), FP32)
    assert_same(all_weights(loaded), all_weights(expected))
    assert_same(dict(load_vae(file, False, FP32).state_dict()), dict(expected.vae.state_dict()))
    facts = dict(inspect(file))
    assert [facts[name] for name in ("missing keys", "extra keys", "wrong shapes")] == ["none"] * 3
