"""The CLIP text encoder (Radford et al. 2021, section 2.4): a causal pre-norm transformer over BPE tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from fastsd.config import CLIPConfig, VisionConfig
from fastsd.kernels.flash_attn import flash_attn
from fastsd.model.layers import LayerNorm, Linear


class TextOutput(NamedTuple):
    """Token features `[B, L, hidden_size]`, and one vector for the whole text `[B, projection_dim or hidden_size]`."""

    hidden: torch.Tensor
    pooled: torch.Tensor


class Insertion(NamedTuple):
    """Vectors `[n, hidden_size]` that replace the token embeddings of text `row` from position `start` on."""

    row: int
    start: int
    vectors: torch.Tensor


class Embeddings(nn.Module):
    """Token plus position embeddings."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.token_embedding = Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids: torch.Tensor, insertions: Sequence[Insertion] = ()) -> torch.Tensor:
        tokens = self.token_embedding.weight[input_ids]
        for row, start, vectors in insertions:
            tokens[row, start : start + len(vectors)] = vectors.to(tokens)
        return tokens + self.position_embedding.weight[: input_ids.shape[1]]


class Embedding(nn.Module):
    """A table of vectors, initialised as in CLIP (normal, 0.02)."""

    def __init__(self, count: int, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, channels, dtype=torch.float32))
        if not self.weight.is_meta:
            nn.init.normal_(self.weight, std=0.02)


class CausalAttention(nn.Module):
    """Multi-head attention of each token to itself and to those before it; or to all, in a vision tower."""

    def __init__(self, channels: int, heads: int, causal: bool = True):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv_proj = Linear(channels, 3 * channels, parts=("q_proj", "k_proj", "v_proj"))
        self.out_proj = Linear(channels, channels)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv_proj(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        return self.out_proj(flash_attn(q, k, v, causal=self.causal), residual=residual)


class TextMLP(nn.Module):
    """The feed-forward of a layer: two linear layers with an activation between them."""

    def __init__(self, channels: int, inner: int, activation: str):
        super().__init__()
        self.activation = activation
        self.fc1 = Linear(channels, inner)
        self.fc2 = Linear(inner, channels)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.fc1(x, activation=self.activation), residual=residual)


class EncoderLayer(nn.Module):
    """Attention and feed-forward, each with a norm before it and a residual around it."""

    def __init__(self, config: CLIPConfig | VisionConfig, causal: bool = True):
        super().__init__()
        self.self_attn = CausalAttention(config.hidden_size, config.num_attention_heads, causal)
        self.layer_norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = TextMLP(config.hidden_size, config.intermediate_size, config.hidden_act)
        self.layer_norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.self_attn(self.layer_norm1(x), residual=x)
        return self.mlp(self.layer_norm2(x), residual=x)


class LayerStack(nn.Module):
    """The encoder's layers, under the name that checkpoints give them."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.layers = nn.ModuleList([EncoderLayer(config) for _ in range(config.num_hidden_layers)])


class TextModel(nn.Module):
    """Embeddings, layers and the final norm, under the names that checkpoints give them."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = LayerStack(config)
        self.final_layer_norm = LayerNorm(config.hidden_size, config.layer_norm_eps)


class TextEncoder(nn.Module):
    """Token ids to text features: CLIP-L, OpenCLIP-H or OpenCLIP-bigG, by `CLIPConfig`."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.config = config
        self.text_model = TextModel(config)
        self.text_projection = (
            Linear(config.hidden_size, config.projection_dim, bias=False) if config.projection_dim else None
        )

    def forward(
        self, input_ids: torch.Tensor, hidden_layer: int = -1, insertions: Sequence[Insertion] = ()
    ) -> TextOutput:
        """Encode texts.

        Args:
            input_ids: `[B, L]`, L at most `max_position_embeddings`; the text ends at the first end token.
            hidden_layer: the hidden state to return: -1 is the last, after the final norm (SD1, SD2), -2 the one before
                it, without a norm (SDXL), and so on.
            insertions: vectors in place of token embeddings (textual inversion, Gal et al. 2022). There `input_ids` may
                hold any id but the end token's.

        Returns:
            `hidden`, the hidden state; `pooled`, the last state at the end token after the final norm, projected where
            the checkpoint has a projection.
        """
        last, pooled, states = self.all_states(input_ids, insertions)
        return TextOutput(last if hidden_layer == -1 else states[hidden_layer], pooled)

    def all_states(
        self, input_ids: torch.Tensor, insertions: Sequence[Insertion] = ()
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
        """The last state after the final norm, the pooled one, and the states before and after every layer."""
        model = self.text_model
        states = [model.embeddings(input_ids, insertions)]
        for layer in model.encoder.layers:
            states.append(layer(states[-1]))
        last = model.final_layer_norm(states[-1])

        if self.config.eos_is_largest_id:
            end = input_ids.argmax(dim=-1)
        else:
            end = (input_ids == self.config.eos_token_id).int().argmax(dim=-1)
        pooled = last[torch.arange(len(last), dtype=torch.int64, device=last.device), end]
        if self.text_projection is not None:
            pooled = self.text_projection(pooled)
        return last, pooled, tuple(states)
