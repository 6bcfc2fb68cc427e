"""CLIP's vision tower (Radford et al. 2021, section 2.2; Dosovitskiy et al. 2021): an image as patches, encoded."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from fastsd.config import VisionConfig
from fastsd.model.clip import Embedding, EncoderLayer
from fastsd.model.layers import Conv2d, LayerNorm, Linear


class VisionOutput(NamedTuple):
    """One vector an image, `[B, projection_dim]`; the state before the last layer, `[B, 1 + patches, hidden_size]`."""

    embedding: torch.Tensor
    hidden: torch.Tensor


class ImageEmbeddings(nn.Module):
    """A vector a patch, one for the image before them, plus their positions."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        channels = config.hidden_size
        self.class_embedding = nn.Parameter(torch.zeros(channels, dtype=torch.float32))
        self.patch_embedding = Conv2d(
            3, channels, config.patch_size, stride=config.patch_size, padding=(0, 0, 0, 0), bias=False
        )
        self.position_embedding = Embedding(1 + config.patches, channels)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        patches = self.patch_embedding(pixels).flatten(1, 2)
        first = self.class_embedding.expand(len(patches), 1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight


class VisionStack(nn.Module):
    """The encoder's layers, under the name that checkpoints give them."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.layers = nn.ModuleList([EncoderLayer(config, causal=False) for _ in range(config.num_hidden_layers)])


class VisionModel(nn.Module):
    """Embeddings, layers and norms, under the names that checkpoints give them."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.embeddings = ImageEmbeddings(config)
        self.pre_layrnorm = LayerNorm(config.hidden_size, config.layer_norm_eps)  # spelt so in every checkpoint
        self.encoder = VisionStack(config)
        self.post_layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps)


class VisionEncoder(nn.Module):
    """Images to features: OpenCLIP's ViT-H/14 or ViT-bigG/14, or another CLIP, by `VisionConfig`."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.vision_model = VisionModel(config)
        self.visual_projection = Linear(config.hidden_size, config.projection_dim, bias=False)

    def forward(self, pixels: torch.Tensor) -> VisionOutput:
        """Encode images `[B, image_size, image_size, 3]`, as `fastsd.image.clip_input` prepares them."""
        model = self.vision_model
        before = state = model.pre_layrnorm(model.embeddings(pixels))
        for layer in model.encoder.layers:
            before, state = state, layer(state)
        return VisionOutput(self.visual_projection(model.post_layernorm(state[:, 0])), before)
