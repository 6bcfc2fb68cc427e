"""IP-Adapter: an image as a few more tokens that every cross-attention reads (Ye et al. 2023, section 3.2)."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from fastsd.config import IPAdapterConfig
from fastsd.kernels.flash_attn import flash_attn
from fastsd.model.layers import LayerNorm, Linear
from fastsd.model.vision import VisionEncoder

RESAMPLER_HEAD = 64  # channels of a head in the resampler of every published file


class EmbeddingTokens(nn.Module):
    """The image's one vector to `config.tokens` tokens."""

    def __init__(self, config: IPAdapterConfig):
        super().__init__()
        self.tokens = config.tokens
        self.proj = Linear(config.image_features, config.tokens * config.text_features)
        self.norm = LayerNorm(config.text_features)

    def forward(self, embedding: torch.Tensor) -> torch.Tensor:
        return self.norm(self.proj(embedding).unflatten(-1, (self.tokens, -1)))


class FullTokens(nn.Module):
    """Every patch's vector to a token (the "full-face" file)."""

    def __init__(self, config: IPAdapterConfig):
        super().__init__()
        inner = config.image_features
        layers = {"0": Linear(inner, inner), "2": Linear(inner, config.text_features)}
        self.proj = nn.ModuleDict({**layers, "3": LayerNorm(config.text_features)})

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.proj["3"](self.proj["2"](self.proj["0"](hidden, activation="gelu")))


class ResamplerAttention(nn.Module):
    """Attention of the queries to the image's patches and to themselves (Alayrac et al. 2022, section 3.1.1)."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads, inner = heads, heads * RESAMPLER_HEAD
        self.norm1, self.norm2 = LayerNorm(channels), LayerNorm(channels)
        self.to_q = Linear(channels, inner, bias=False)
        self.to_kv = Linear(channels, 2 * inner, bias=False)
        self.to_out = Linear(inner, channels, bias=False)

    def forward(self, hidden: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        own = self.norm2(queries)
        k, v = self.to_kv(torch.cat([self.norm1(hidden), own], dim=1)).unflatten(-1, (2, self.heads, -1)).unbind(2)
        q = self.to_q(own).unflatten(-1, (self.heads, -1))
        return self.to_out(flash_attn(q, k, v), residual=queries)


class ResamplerTokens(nn.Module):
    """All patches' vectors to `config.tokens` tokens, by queries that are learned (the "plus" files)."""

    def __init__(self, config: IPAdapterConfig):
        super().__init__()
        channels = config.resampler_channels
        self.latents = nn.Parameter(torch.zeros(1, config.tokens, channels, dtype=torch.float32))
        self.proj_in = Linear(config.image_features, channels)
        self.layers = nn.ModuleList(self._layer(config) for _ in range(config.resampler_layers))
        self.proj_out = Linear(channels, config.text_features)
        self.norm_out = LayerNorm(config.text_features)

    @staticmethod
    def _layer(config: IPAdapterConfig) -> nn.ModuleDict:
        channels, inner = config.resampler_channels, config.resampler_inner
        feed = {
            "0": LayerNorm(channels),
            "1": Linear(channels, inner, bias=False),
            "3": Linear(inner, channels, bias=False),
        }
        return nn.ModuleDict({"0": ResamplerAttention(channels, config.resampler_heads), "1": nn.ModuleDict(feed)})

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        queries, hidden = self.latents.expand(len(hidden), -1, -1), self.proj_in(hidden)
        for layer in self.layers:
            attention, feed = (cast(Any, layer)[part] for part in ("0", "1"))
            queries = attention(hidden, queries)
            queries = feed["3"](feed["1"](feed["0"](queries), activation="gelu"), residual=queries)
        return self.norm_out(self.proj_out(queries))


class ImageKeyValues(nn.Module):
    """What one cross-attention reads of the image: its own keys and values of the tokens."""

    def __init__(self, text_features: int, channels: int):
        super().__init__()
        self.to_kv = Linear(text_features, 2 * channels, bias=False, parts=("to_k_ip", "to_v_ip"))


KINDS = {"embedding": EmbeddingTokens, "full": FullTokens, "resampler": ResamplerTokens}


class IPAdapter(nn.Module):
    """An IP-Adapter's file and the vision tower that it reads images with.

    Args:
        config: what the file is.
        heads: of each cross-attention of the UNet, in order of use.
        encoder: the vision tower.
    """

    def __init__(self, config: IPAdapterConfig, heads: tuple[int, ...], encoder: VisionEncoder | None = None):
        super().__init__()
        self.config, self.heads = config, heads
        self.image_proj = KINDS[config.kind](config)
        self.ip_adapter = nn.ModuleList([ImageKeyValues(config.text_features, width) for width in config.widths])
        self.encoder = encoder

    @property
    def weight(self) -> torch.Tensor:
        """One of its weights, of their precision and device."""
        return cast(ImageKeyValues, self.ip_adapter[0]).to_kv.weight

    def project(self, pixels: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """Keys and values of every cross-attention, `[1, tokens, 2, heads, D]` each: without the images, and with them.

        Args:
            pixels: `[images, size, size, 3]`; their tokens stand one after another.

        As in training, no image is a vector of zeros where the adapter reads the one vector, else a grey image.
        """
        assert self.encoder is not None
        found = self.encoder(pixels)
        if self.config.kind == "embedding":
            with_image, without = found.embedding, torch.zeros_like(found.embedding)
        else:
            with_image, without = found.hidden, self.encoder(torch.zeros_like(pixels[:1])).hidden
            without = without.expand_as(with_image)
        return self._key_values(without), self._key_values(with_image)

    def _key_values(self, features: torch.Tensor) -> tuple[torch.Tensor, ...]:
        tokens = self.image_proj(features).flatten(0, 1)[None]
        return tuple(
            layer.to_kv(tokens).unflatten(-1, (2, heads, -1))
            for layer, heads in zip(cast(list[ImageKeyValues], self.ip_adapter), self.heads)
        )
