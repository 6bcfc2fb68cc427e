"""Folders in the diffusers layout: the forms of the vocabulary, and one line for each defect."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsd.config import EDMConfig, SchedulerConfig
from fastsd.errors import FastsdError
from fastsd.weights import load_folder, save_folder
from fastsd.weights.layouts.folder import reads_scaled
from tests.support.folders import UNET_FILE, edit_json
from tests.support.tiny import sd1, sdxl


@pytest.mark.parametrize("kept", ["tokenizer.json", "vocab.json and merges.txt"])
def test_either_form_of_the_vocabulary(folder: Path, kept: str) -> None:
    """transformers 5 writes only tokenizer.json, older versions the two files."""
    import transformers

    tokenizer = transformers.CLIPTokenizerFast.from_pretrained(folder / "tokenizer")
    shutil.rmtree(folder / "tokenizer")
    (folder / "tokenizer").mkdir()
    if kept == "tokenizer.json":
        tokenizer.backend_tokenizer.save(str(folder / "tokenizer/tokenizer.json"))
    else:
        vocabulary = sd1().tokenizers[0]
        vocabulary.save(folder / "tokenizer")
        (folder / "tokenizer/tokenizer.json").unlink(missing_ok=True)
    found, expected = load_folder(folder, torch.float32).tokenizers[0], sd1().tokenizers[0]
    for text in ("a cat, 1234 naïve 猫", "", "word " * 100):
        assert torch.equal(found(text), expected(text))


def cut(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


BAD_FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no index": (lambda f: (f / "model_index.json").unlink(), "no model_index.json"),
    "index is a list": (lambda f: (f / "model_index.json").write_text("[]"), "model_index.json: not a JSON object"),
    "index is cut": (lambda f: cut(f / "model_index.json", 20), "model_index.json: not JSON"),
    "index is binary": (lambda f: (f / "model_index.json").write_bytes(b"\xff\xfe\x00"), "not JSON"),
    "a digit too many": (
        lambda f: (f / "unet/config.json").write_text('{"block_out_channels": [' + "9" * 5000 + "]}"),
        "config.json: block_out_channels",
    ),
    "fastsd's defaults are a list": (lambda f: (f / "fastsd.json").write_text('{"defaults": [1]}'), "defaults is"),
    "fastsd's words are numbers": (lambda f: (f / "fastsd.json").write_text('{"known_words": [1]}'), "known_words is"),
    "fastsd's method is a list": (lambda f: (f / "fastsd.json").write_text('{"few_step": []}'), "few_step is"),
    "no unet": (lambda f: shutil.rmtree(f / "unet"), "the folder unet/ is missing"),
    "no text encoder": (lambda f: shutil.rmtree(f / "text_encoder"), "no text_encoder folder"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "tokenizer"),
    "no weights": (lambda f: (f / UNET_FILE).unlink(), "no weights; expected diffusion_pytorch_model.safetensors"),
    "no config": (lambda f: (f / "unet/config.json").unlink(), "config.json: cannot be read"),
    "weights are a Git LFS pointer": (
        lambda f: (f / UNET_FILE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"),
        "a Git LFS pointer, not the file itself",
    ),
    "weights are cut": (lambda f: cut(f / UNET_FILE, 40_000), "diffusion_pytorch_model.safetensors"),
    "weights are empty": (lambda f: (f / UNET_FILE).write_bytes(b""), "not a complete safetensors file"),
    "weights are too long": (
        lambda f: (f / UNET_FILE).write_bytes((f / UNET_FILE).read_bytes() + b"more"),
        "its header accounts for",
    ),
    "unknown block": (
        lambda f: edit_json(f / "unet/config.json", down_block_types=["DownBlock2D", "AttnDownBlock2D"]),
        "down_block_types is",
    ),
    "heads do not divide": (lambda f: edit_json(f / "unet/config.json", attention_head_dim=[3, 4]), "multiple of its"),
    "unknown activation": (lambda f: edit_json(f / "text_encoder/config.json", hidden_act="relu"), "hidden_act"),
    "unknown scheduler": (
        lambda f: edit_json(f / "scheduler/scheduler_config.json", _class_name="PixelScheduler"),
        "_class_name is 'PixelScheduler'",
    ),
    "another text encoder": (
        lambda f: edit_json(f / "unet/config.json", cross_attention_dim=48),
        "give 32 features, its UNet reads 48",
    ),
    "a UNet for other latents": (
        lambda f: edit_json(f / "unet/config.json", in_channels=10),
        "its UNet reads 10 channels; fastsd runs UNets that read 4, 5 (a depth map), 8",
    ),
    "absurd size": (lambda f: edit_json(f / "unet/config.json", in_channels=2**40), "in_channels is"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_each_defect_is_one_line(folder: Path, case: str) -> None:
    change, message = BAD_FOLDERS[case]
    change(folder)
    with pytest.raises(FastsdError) as error:
        load_folder(folder, torch.float32)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_added_conditioning_of_the_wrong_width(tmp_path: Path) -> None:
    """SDXL's UNet reads the pooled text and six sizes; the refiner's reads five."""
    save_folder(sdxl(), tmp_path, torch.float32)
    edit_json(tmp_path / "model_index.json", requires_aesthetics_score=True)
    with pytest.raises(FastsdError, match="give 64 added features, the UNet reads 72"):
        load_folder(tmp_path, torch.float32)


def test_a_missing_and_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(FastsdError, match="no such model"):
        load_folder(tmp_path / "nowhere", torch.float32)
    with pytest.raises(FastsdError, match="the folder is empty"):
        load_folder(tmp_path, torch.float32)


@pytest.mark.parametrize(
    ("index", "scheduler", "scaled"),
    [
        ({}, SchedulerConfig(prediction_type="v_prediction"), False),
        ({"is_cosxl_edit": True}, SchedulerConfig(), True),
        ({"is_cosxl_edit": False}, SchedulerConfig(prediction_type="v_prediction", edm=EDMConfig()), True),
        ({}, SchedulerConfig(edm=EDMConfig()), False),
    ],
)
def test_the_image_to_edit_is_scaled_in_cosxl(index: dict[str, Any], scheduler: SchedulerConfig, scaled: bool) -> None:
    assert reads_scaled(index, scheduler) == scaled
