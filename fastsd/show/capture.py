"""Attention as the network computes it, noted by hooks that are there only while a drawing needs them.

The probabilities are computed beside the network's own attention, by its reference: softmax(q k^T / sqrt(D)) in fp32.
Nothing of the network's result changes, and without hooks nothing is computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from fastsd.model.layers import CrossAttention, SelfAttention
from fastsd.model.unet import UNet


@dataclass
class AttentionRecord:
    """What was noted, call by call of the UNet.

    Attributes:
        cross: for each layer's name, a list over calls of `[S, L]`: how much each of S pixels looks at each of L
            tokens, the mean over heads; of the conditional part of the batch, its last image.
        own: for each layer's name, a list over calls of `[S]`: how much the chosen pixel looks at every pixel.
        shapes: (height, width) of each layer's map.
    """

    cross: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    own: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)


@contextmanager
def recorded(unet: UNet, latent: tuple[int, int], pixel: tuple[float, float]) -> Iterator[AttentionRecord]:
    """Note the attention of every call of `unet` within the context.

    Args:
        latent: (height, width) of the latents, from which the shape of each map follows.
        pixel: (x, y) in shares of width and height, whose self-attention is noted.
    """
    record, handles = AttentionRecord(), []

    def cross_hook(name: str) -> Any:
        def note(module: CrossAttention, arguments: tuple[Any, ...]) -> None:
            x, key_value = arguments[0][-1:], arguments[1][-1:]
            record.shapes[name] = map_shape(x.shape[1], latent)
            query = module.to_q(x).unflatten(-1, (module.heads, -1))
            record.cross.setdefault(name, []).append(probabilities(query, key_value[:, :, 0]).mean(0).cpu())

        return note

    def own_hook(name: str) -> Any:
        def note(module: SelfAttention, arguments: tuple[Any, ...]) -> None:
            x = arguments[0][-1:]
            height, width = record.shapes[name] = map_shape(x.shape[1], latent)
            query, key, _ = module.to_qkv(x).unflatten(-1, (3, module.heads, -1)).unbind(2)
            at = min(int(pixel[1] * height), height - 1) * width + min(int(pixel[0] * width), width - 1)
            record.own.setdefault(name, []).append(probabilities(query[:, at : at + 1], key).mean(0)[0].cpu())

        return note

    for name, module in unet.named_modules():
        if isinstance(module, CrossAttention):
            handles.append(module.register_forward_pre_hook(cross_hook(name)))
        elif isinstance(module, SelfAttention):
            handles.append(module.register_forward_pre_hook(own_hook(name)))
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def probabilities(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)): `[1, S, heads, D]` and `[1, L, heads, D]` to `[heads, S, L]` fp32."""
    q, k = query[0].float().transpose(0, 1), key[0].float().transpose(0, 1)
    return (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)


def map_shape(count: int, latent: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a map of `count` pixels: the latents' shape halved, rounding up, until it has as many."""
    height, width = latent
    while height * width > count and (height > 1 or width > 1):
        height, width = -(-height // 2), -(-width // 2)
    assert height * width == count, (count, latent)
    return height, width


def short_name(name: str) -> str:
    """ "down 0.1" for "down_blocks.0.attentions.1.transformer_blocks.0.attn2"; blocks after the first are numbered."""
    parts = name.split(".")
    if parts[0] == "mid_block":
        where = "mid"
    else:
        where = f"{parts[0].removesuffix('_blocks')} {parts[1]}.{parts[3]}"
    block = parts[parts.index("transformer_blocks") + 1]
    return where if block == "0" else f"{where} block {block}"
