"""The older key names that folders may have."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from fastsd.weights import load_folder
from tests.support.folders import TEXT_FILE, VAE_FILE, rename, rewrite, same_weights
from tests.support.tiny import sd1


def test_old_names_of_the_vaes_attention(folder: Path) -> None:
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def old_key(key: str) -> str:
        for name, old_name in old.items():
            key = key.replace(f"attentions.0.{name}.", f"attentions.0.{old_name}.")
        return key

    rename(folder / VAE_FILE, old_key)
    assert any(".proj_attn." in key for key in load_file(folder / VAE_FILE))
    assert same_weights(load_folder(folder, torch.float32), sd1())


def test_text_encoders_without_prefix_and_with_position_ids(folder: Path) -> None:
    rename(folder / TEXT_FILE, lambda key: key.removeprefix("text_model."))
    ids = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    rewrite(folder / TEXT_FILE, lambda stored: stored | ids)
    assert same_weights(load_folder(folder, torch.float32), sd1())
