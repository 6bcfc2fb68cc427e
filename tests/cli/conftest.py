"""A tiny random checkpoint in a folder, and the command line run on it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from fastsd.cli import main
from fastsd.components import Components
from fastsd.config import CLIPConfig, SchedulerConfig, UNetConfig, VAEConfig
from fastsd.model.clip import TextEncoder
from fastsd.model.tokenizer import Tokenizer
from fastsd.model.unet import UNet
from fastsd.model.vae import AutoencoderKL
from fastsd.weights import save_folder


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random weights that draws 64x64 in two steps."""
    torch.manual_seed(0)
    unet = UNetConfig(
        block_out_channels=(32, 64),
        layers_per_block=1,
        transformer_layers_per_block=(1, 0),
        num_attention_heads=(2, 4),
        cross_attention_dim=32,
        norm_num_groups=8,
    )
    components = Components(
        unet=UNet(unet),
        vae=AutoencoderKL(VAEConfig(block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4)),
        text_encoders=(
            TextEncoder(CLIPConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)),
        ),
        tokenizers=(Tokenizer(),),
        scheduler=SchedulerConfig(sampler="ddim"),
        sample_size=8,
        name="tiny",
        defaults={"num_inference_steps": 2},
    )
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_folder(components, folder, torch.float32)
    return folder


@dataclass
class Ran:
    """How a run of the command line ended."""

    code: int
    out: str
    err: str

    @property
    def paths(self) -> list[Path]:
        return [Path(line) for line in self.out.splitlines()]


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """`cli("--prompt", "x", ...)` in an empty folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delenv("FASTSD_DEBUG", raising=False)
    assert os.listdir() == []

    def run(*words: object) -> Ran:
        capsys.readouterr()
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return run
