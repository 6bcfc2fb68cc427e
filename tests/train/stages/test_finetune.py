"""Full fine-tuning: every weight of the UNet moves, the result is a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastsd.errors import FastsdError
from fastsd.runtime import memory
from fastsd.train.training import train
from fastsd.train.tuning import loaded
from fastsd.weights import load_folder, save_folder
from tests.support import tiny
from tests.support.training import write_data

CONFIG = """
out = "{folder}/run"
model = "{folder}/model"
threads = 1
precision = "fp32"
[data]
kind = "digits"
path = "{folder}/mnist"
limit = 6
[finetune]
train_text = true
[finetune.fit]
steps = 2
batch_size = 2
rate = 1e-3
warmup = 0
average = 0.0
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    vae = replace(tiny.VAE, block_out_channels=(4, 4, 4, 8))
    save_folder(tiny.sd1(vae=vae), tmp_path / "model", torch.float32)
    write_data(tmp_path)
    (tmp_path / "config.toml").write_text(CONFIG.format(folder=tmp_path.as_posix()))
    return tmp_path / "config.toml"


def test_a_run_and_its_model(config: Path) -> None:
    train(config)
    before = tiny.all_weights(load_folder(config.parent / "model", torch.float32))
    after = tiny.all_weights(load_folder(config.parent / "run" / "model", torch.float32))
    assert before.keys() == after.keys()
    same = [key for key in before if torch.equal(before[key].half().float(), after[key])]
    assert all(key.startswith("vae.") for key in same), same[:5]


def test_too_little_memory(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is needed, what is free, what would fit; before anything is written."""
    monkeypatch.setattr(loaded, "available", lambda device: 2**20)
    with pytest.raises(FastsdError, match="gradients and AdamW's state of .* parameters take .* are free .* a LoRA"):
        train(config)
    assert memory.GIB == 2**30 and not (config.parent / "run" / "finetune.pt").exists()
