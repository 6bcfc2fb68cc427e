"""Checkpoints that people have and that crashed, were refused for the wrong reason, or were read as something else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastsd.errors import FastsdError
from fastsd.pipeline import Pipeline
from fastsd.weights import save_folder
from tests.support import original

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
