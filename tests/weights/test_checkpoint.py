"""What folders and single files have in common: another autoencoder, averaged weights, the prediction type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastsd.errors import FastsdError
from fastsd.weights import load_checkpoint, load_folder
from fastsd.weights.convert import convert
from tests.support.tiny import assert_same

FP32 = torch.float32


def test_another_autoencoder_replaces_the_checkpoints(originals: Any) -> None:
    """In a file that has none, in one that has one, and in a folder."""
    tensors = originals.tensors("sd1")
    changed = {k: v + 1 for k, v in tensors.items() if k.startswith("first_stage_model.")}
    path = originals.save(changed, "vae.safetensors")
    bare = originals.save({k: v for k, v in tensors.items() if k not in changed}, "bare.safetensors")
    own = load_folder(originals.folder("sd1"), FP32).vae
    for checkpoint in (bare, originals.file("sd1"), originals.folder("sd1")):
        vae = load_checkpoint(checkpoint, FP32, vae=path).vae
        assert_same(dict(vae.state_dict()), {key: value + 1 for key, value in own.state_dict().items()})
        assert vae.config == own.config
    with pytest.raises(FastsdError, match="no autoencoder in this file.*vae"):
        load_checkpoint(bare, FP32)


def test_the_prediction_type_applies_to_both_layouts(originals: Any) -> None:
    for path in (originals.file("sd1"), originals.folder("sd1")):
        components = load_checkpoint(path, FP32, prediction="v_prediction")
        assert components.scheduler.prediction_type == "v_prediction"
        with pytest.raises(FastsdError, match="prediction is 'v'; it should be one of epsilon, v_prediction, sample"):
            load_checkpoint(path, FP32, prediction="v")


def test_a_folder_has_no_averaged_weights(originals: Any, tmp_path: Path) -> None:
    with pytest.raises(FastsdError, match="a folder holds only one set of UNet weights"):
        load_checkpoint(originals.folder("sd1"), FP32, ema=True)
    with pytest.raises(FastsdError, match="a folder holds only one set of UNet weights"):
        convert(originals.folder("sd1"), tmp_path / "x", ema=True)
