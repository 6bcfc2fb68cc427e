"""A checkpoint folder in the diffusers layout, as a set of models ready to run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastsd.config import SchedulerConfig
from fastsd.errors import FastsdError
from fastsd.model.clip import TextEncoder
from fastsd.model.tokenizer import Tokenizer
from fastsd.model.unet import UNet
from fastsd.model.vae import AutoencoderKL
from fastsd.weights import configs
from fastsd.weights.embeddings import Embedding
from fastsd.weights.load import find_files, load_module

OWN_FILE = "fastsd.json"  # what only fastsd reads: default settings, known words


@dataclass
class Components:
    """Everything that a checkpoint holds.

    Attributes:
        unet, vae: the networks.
        text_encoders, tokenizers: one of each, or two (SDXL), in the order in which their features are joined.
        scheduler: training schedule and the checkpoint's own sampler.
        sample_size: side of the latents that it was trained on.
        name: for metadata and messages.
        zeros_for_empty_prompt: an empty negative prompt is all zeros, not the encoding of "" (SDXL base).
        aesthetic_score: the added conditioning holds a score (SDXL refiner).
        defaults: settings of `Pipeline.__call__` that the checkpoint's author recommends.
        known_words: the whole vocabulary of a model trained on few words, or empty.
        embeddings: textual inversions by the name that stands for them in a prompt.
    """

    unet: UNet
    vae: AutoencoderKL
    text_encoders: tuple[TextEncoder, ...]
    tokenizers: tuple[Tokenizer, ...]
    scheduler: SchedulerConfig
    sample_size: int
    name: str = "model"
    zeros_for_empty_prompt: bool = False
    aesthetic_score: bool = False
    defaults: dict[str, Any] = field(default_factory=dict)
    known_words: frozenset[str] = frozenset()
    embeddings: dict[str, Embedding] = field(default_factory=dict)


def load_folder(
    path: str | Path,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    vae: Callable[[bool], AutoencoderKL] | None = None,
) -> Components:
    """Load a folder that diffusers (or `save_folder`) wrote.

    Args:
        path: the folder with `model_index.json`.
        dtype: of all weights.
        device: where they go; each tensor goes there straight from its file.
        vae: gives the autoencoder instead of the folder's own; it is told whether the model is SDXL.

    Raises:
        FastsdError: something is missing, malformed or does not fit; one line with file and key.
    """
    root, device = Path(path), torch.device(device)
    check_is_model(root)
    index = configs.read_json(root / "model_index.json")
    half = dtype != torch.float32

    unet_config, sample_size = configs.read_unet(root / "unet" / "config.json")
    own = configs.read_json(root / OWN_FILE) if (root / OWN_FILE).is_file() else {}
    text_encoders, tokenizers = [], []
    for suffix in ("", "_2"):
        if not (root / f"text_encoder{suffix}").is_dir():
            continue
        clip_config = configs.read_clip(root / f"text_encoder{suffix}" / "config.json")
        files = find_files(root / f"text_encoder{suffix}", "model", half)
        tokenizers.append(Tokenizer(root / f"tokenizer{suffix}"))
        text_encoders.append(load_module(partial(TextEncoder, clip_config), files, dtype, device))
    if not text_encoders:
        raise FastsdError(f"{root}: no text_encoder folder; a Stable Diffusion checkpoint has one or two")
    width = sum(encoder.config.hidden_size for encoder in text_encoders)
    if width != unet_config.cross_attention_dim:
        raise FastsdError(
            f"{root}: the text encoders give {width} features where the UNet reads {unet_config.cross_attention_dim}"
        )

    weights = "diffusion_pytorch_model"
    if vae is None:
        vae_config = configs.read_vae(root / "vae" / "config.json")
        vae_files = find_files(root / "vae", weights, half)
        autoencoder = load_module(partial(AutoencoderKL, vae_config), vae_files, dtype, device)
    else:
        autoencoder = vae(unet_config.addition_time_embed_dim > 0)
    return Components(
        unet=load_module(partial(UNet, unet_config), find_files(root / "unet", weights, half), dtype, device),
        vae=autoencoder,
        text_encoders=tuple(text_encoders),
        tokenizers=tuple(tokenizers),
        scheduler=configs.read_scheduler(root / "scheduler" / "scheduler_config.json"),
        sample_size=sample_size,
        name=root.resolve().name,
        zeros_for_empty_prompt=index.get("force_zeros_for_empty_prompt") is True,
        aesthetic_score=index.get("requires_aesthetics_score") is True,
        defaults=own.get("defaults", {}),
        known_words=frozenset(own.get("known_words", ())),
    )


def check_is_model(root: Path) -> None:
    """Refuse what is no checkpoint folder, saying what it is."""
    if not root.exists():
        raise FastsdError(f"{root}: no such model; give a folder that holds model_index.json")
    if not root.is_dir():
        raise FastsdError(f"{root}: not a folder")
    if not any(root.iterdir()):
        raise FastsdError(f"{root}: the folder is empty; a model folder holds model_index.json, unet/, vae/, ...")
    if not (root / "model_index.json").is_file():
        raise FastsdError(f"{root}: no model_index.json in this folder, so it is no model in the diffusers layout")
    for part in ("unet", "vae", "scheduler"):
        if not (root / part).is_dir():
            raise FastsdError(f"{root}: the folder {part}/ is missing; fetch the model again")
