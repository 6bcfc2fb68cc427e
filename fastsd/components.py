"""A loaded checkpoint: its networks, tokenizers, noise schedule and textual inversions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fastsd.config import SchedulerConfig
from fastsd.few_step import Detection
from fastsd.model.clip import TextEncoder
from fastsd.model.taesd import Autoencoder
from fastsd.model.tokenizer import Tokenizer
from fastsd.model.unet import UNet


@dataclass(frozen=True)
class TextualInversion:
    """Vectors that a prompt uses by name, in place of token embeddings (Gal et al. 2022).

    Attributes:
        names: the words that stand for it in a prompt.
        vectors: `[n, hidden]` fp32 for each text encoder of the checkpoint.
    """

    names: tuple[str, ...]
    vectors: tuple[torch.Tensor, ...]


@dataclass
class Components:
    """A checkpoint's contents.

    Attributes:
        unet, vae: the networks.
        text_encoders, tokenizers: one of each, or two (SDXL), in the order in which their features are concatenated.
        scheduler: the training schedule and the checkpoint's own sampler.
        sample_size: side of the latents in training.
        name: for metadata and messages.
        zeros_for_empty_prompt: zeros stand for an empty negative prompt, not the encoding of "" (SDXL base).
        scaled_image: the image to edit is given to the UNet scaled, like the latent (CosXL Edit).
        aesthetic_score: the added conditioning holds a score (SDXL refiner).
        defaults: settings of `Pipeline.__call__` that the checkpoint's author recommends.
        known_words: the whole vocabulary of a model trained on few words, or empty.
        few_step: the kind of few-step model that its files state, or None.
        embeddings: textual inversions, by each of their names.
    """

    unet: UNet = field(repr=False)
    vae: Autoencoder = field(repr=False)
    text_encoders: tuple[TextEncoder, ...] = field(repr=False)
    tokenizers: tuple[Tokenizer, ...] = field(repr=False)
    scheduler: SchedulerConfig
    sample_size: int
    name: str = "model"
    zeros_for_empty_prompt: bool = False
    aesthetic_score: bool = False
    scaled_image: bool = False
    defaults: dict[str, Any] = field(default_factory=dict)
    known_words: frozenset[str] = frozenset()
    few_step: Detection | None = None
    embeddings: dict[str, TextualInversion] = field(default_factory=dict, repr=False)

    @property
    def xl(self) -> bool:
        """SDXL or its refiner."""
        return self.unet.config.addition_time_embed_dim > 0

    def networks(self) -> Iterator[tuple[str, nn.Module]]:
        """Every network, by the name of its folder. SDXL's refiner has only the second text encoder."""
        for i, encoder in enumerate(self.text_encoders):
            yield "text_encoder_2" if i or (self.xl and len(self.text_encoders) == 1) else "text_encoder", encoder
        yield "unet", self.unet
        yield "vae", self.vae
