"""Changes to the files of a diffusers folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from fastsd.components import Components
from tests.support.tiny import all_weights

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
VAE_FILE = "vae/diffusion_pytorch_model.safetensors"
TEXT_FILE = "text_encoder/model.safetensors"
Tensors = dict[str, torch.Tensor]


def same_weights(found: Components, expected: Components) -> bool:
    ours, theirs = all_weights(found), all_weights(expected)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def rewrite(file: Path, change: Callable[[Tensors], Tensors]) -> None:
    save_file({key: value.contiguous() for key, value in change(load_file(file)).items()}, file)


def rename(file: Path, new_key: Callable[[str], str]) -> None:
    rewrite(file, lambda stored: {new_key(key): value for key, value in stored.items()})


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def shard(file: Path, count: int, index: Path) -> None:
    """Replace a weight file by `count` shards with an index."""
    stored = load_file(file)
    file.unlink()
    names = {key: f"part-{i % count}.safetensors" for i, key in enumerate(sorted(stored))}
    for name in set(names.values()):
        save_file({key: stored[key] for key in stored if names[key] == name}, file.parent / name)
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
