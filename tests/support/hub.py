"""The bundled model's files as a repository of the hub stores them."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load, save

from fastsd.bundled import BUNDLED
from fastsd.weights.hub import locate

OLD, NEW = "a" * 40, "c" * 40  # commits
FOLDER = BUNDLED["digits"]
DIGITS = {path.relative_to(FOLDER).as_posix(): path.read_bytes() for path in FOLDER.rglob("*") if path.is_file()}
# Files that repositories hold beside a model's and that must not be fetched.
UNNEEDED = {
    "README.md": b"# digits",
    "digits.safetensors": b"a single-file copy",
    "digits.ckpt": b"a pickle",
    "unet/diffusion_pytorch_model.bin": b"a pickle",
    "unet/diffusion_pytorch_model.non_ema.safetensors": b"other weights",
    "text_encoder/flax_model.msgpack": b"another framework's",
    "vae/model.onnx": b"another framework's",
    "safety_checker/config.json": b"{}",
    "safety_checker/model.safetensors": b"not used",
    "feature_extractor/preprocessor_config.json": b"{}",
}
WEIGHTS = ["text_encoder/model", "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model"]


def half(data: bytes) -> bytes:
    """The fp16 variant of a weight file."""
    return save({key: tensor.half() for key, tensor in load(data).items()})


def sharded(files: dict[str, bytes], stem: str) -> dict[str, bytes]:
    """The files, with the weights of the network `stem` in two shards."""
    tensors = load(files[f"{stem}.safetensors"])
    folder, _, name = stem.rpartition("/")
    keys = sorted(tensors)
    shards = {f"{name}-00001-of-00002.safetensors": keys[::2], f"{name}-00002-of-00002.safetensors": keys[1::2]}
    index = {"metadata": {}, "weight_map": {key: shard for shard, keys in shards.items() for key in keys}}
    result = {name: data for name, data in files.items() if name != f"{stem}.safetensors"}
    result |= {f"{folder}/{shard}": save({key: tensors[key] for key in keys}) for shard, keys in shards.items()}
    return result | {f"{stem}.safetensors.index.json": json.dumps(index).encode()}


def model_path(text: str, revision: str | None = None, halved: bool = False) -> Path:
    return locate.locate_model(text, revision, halved).path
