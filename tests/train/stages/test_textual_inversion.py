"""A new word: learned, saved, and opened again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastsd.errors import FastsdError
from fastsd.model.vae import AutoencoderKL
from fastsd.train.stages.textual_inversion import InversionSettings
from fastsd.train.training import train
from fastsd.weights import load_folder, save_folder
from fastsd.weights.adapters.embeddings import load_embedding
from tests.support import tiny
from tests.support.training import write_data

CONFIG = """
out = "{folder}/run"
model = "{folder}/{model}"
threads = 1
precision = "fp32"
[data]
kind = "digits"
path = "{folder}/mnist"
limit = 6
[textual_inversion]
token = "<bar>"
initial = "a toy"
vectors = 3
[textual_inversion.fit]
steps = 2
batch_size = 2
rate = 1e-2
warmup = 0
average = 0.0
"""


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", ["sd1", "sdxl"])
def test_a_run_and_its_file(model: str, precision: str, tmp_path: Path) -> None:
    """The vectors begin as those of the initial words, the last one twice, and move; ours and others' readers take the
    file: one key, the token, of SD 1, and clip_l with clip_g of SDXL."""
    components = {"sd1": tiny.sd1, "sdxl": tiny.sdxl}[model]()
    components.vae = AutoencoderKL(replace(tiny.VAE, block_out_channels=(4, 4, 4, 8)))
    save_folder(components, tmp_path / model, torch.float32)
    write_data(tmp_path)
    (tmp_path / "config.toml").write_text(CONFIG.format(folder=tmp_path.as_posix(), model=model))
    train(tmp_path / "config.toml", changes=[f"precision={precision}"])
    file = tmp_path / "run" / "model" / "bar.safetensors"
    assert list(load_file(file)) == (["<bar>"] if model == "sd1" else ["clip_g", "clip_l"])
    components = load_folder(tmp_path / model, torch.float32)
    loaded = load_embedding(file, components.text_encoders)
    assert loaded.names == (("bar", "<bar>") if model == "sd1" else ("bar",))
    for which, vectors in enumerate(loaded.vectors):
        table = components.text_encoders[which].text_model.embeddings.token_embedding.weight
        ids = components.tokenizers[which].ids("a toy")
        moved = (vectors - table[[ids[0], ids[1], ids[1]]]).abs()
        assert 0 < float(moved.max()) <= 2 * 1e-2 * 1.01  # two steps of Adam, each of the rate at most


BAD = {
    "token is ' '; it should be a word": {"token": " "},
    "initial is ''; it should be a word that is close": {"initial": ""},
    "vectors is 0; it should be from 1 to 75": {"vectors": 0},
    "templates is 'a photo'; it should hold {} once": {"templates": ("a photo",)},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_settings(message: str) -> None:
    from fastsd.train.settings import Fit

    fields = {"initial": "toy"} | BAD[message]
    with pytest.raises(FastsdError, match=message.replace("{}", "{}")):
        InversionSettings(fit=Fit(steps=1), **fields).check()  # type: ignore[arg-type]
