"""The layers that UNet, VAE and CLIP are built from: parameters here, computation in `fastsd.kernels`.

Maps are channels-last, `[B, H, W, C]`; the same bytes read as `[B, S, C]`, S = H * W, are the transformer's tokens.
Parameters have the names and shapes of a diffusers folder, with two exceptions that `fastsd.weights` converts: a
`Linear` with `parts` stacks several of the checkpoint's matrices (one product instead of three), and 1 x 1 convolutions
are `Linear` here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastsd.kernels import dispatch
from fastsd.kernels.conv2d import Padding
from fastsd.kernels.flash_attn import flash_attn
from fastsd.kernels.geglu import geglu
from fastsd.kernels.geglu_fp8 import geglu_fp8
from fastsd.kernels.groupnorm_silu import groupnorm_silu
from fastsd.kernels.layernorm import Vectors, layernorm
from fastsd.kernels.upsample2x import upsample2x
from fastsd.model.conv2d import SAME
from fastsd.model.conv2d import Conv2d as Conv2d
from fastsd.model.linear import Linear as Linear

KeyValue = torch.Tensor | tuple[torch.Tensor, ...]  # what a cross-attention reads, see `CrossAttention`


class GroupNorm(nn.Module):
    """Group normalisation of `[B, H, W, C]`, then SiLU with `silu`."""

    def __init__(self, groups: int, channels: int, eps: float, silu: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(channels, dtype=torch.float32))
        self.groups, self.eps, self.silu = groups, eps, silu

    def forward(
        self,
        x: torch.Tensor,
        add: torch.Tensor | None = None,
        skip: torch.Tensor | None = None,
        ahead: torch.Tensor | None = None,
    ) -> Any:
        """`norm(cat([x, skip]) + add)`; with `ahead` a pair, also `cat([x, skip]) + add + ahead`."""
        return groupnorm_silu(x, self.weight, self.bias, self.groups, self.eps, self.silu, add, skip, ahead)


class LayerNorm(nn.Module):
    """Layer normalisation of the last dimension."""

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(channels, dtype=torch.float32))
        self.eps = eps

    def forward(self, x: torch.Tensor, ahead: Vectors = (), owed: Vectors = ()) -> Any:
        """`norm(x - owed)`; with `ahead` a pair, also `x + ahead`."""
        return layernorm(x, self.weight, self.bias, self.eps, ahead, owed)


class ResBlock(nn.Module):
    """GroupNorm, SiLU, conv, twice, with a shortcut (Ho et al. 2020, appendix B).

    `UNet` projects the time embedding of all its blocks in one product, and adds biases of their convolutions there. On
    a GPU, a shortcut's product adds what `conv2` computed and the biases of both.
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int, eps: float):
        super().__init__()
        self.out_channels = out_channels
        self.norm1 = GroupNorm(groups, in_channels, eps, silu=True)
        self.conv1 = Conv2d(in_channels, out_channels)
        self.norm2 = GroupNorm(groups, out_channels, eps, silu=True)
        self.conv2 = Conv2d(out_channels, out_channels)
        self.conv_shortcut = Linear(in_channels, out_channels) if in_channels != out_channels else None

    def forward(
        self, x: torch.Tensor, time: torch.Tensor | None = None, skip: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`x` `[B, H, W, Cin]` to `[B, H, W, Cout]`.

        Args:
            time: the projected time embedding plus `conv1.bias`, `[B or 1, Cout]`, and with a shortcut, in Cout more
                columns, `conv2.bias + conv_shortcut.bias`; None where there is no time (VAE).
            skip: further channels of `x`, which with them has Cin.
        """
        folds, in_norm, biases = dispatch.folds(x, self.conv1.weight), time is not None, None
        if time is not None:
            time, biases = time[:, : self.out_channels], time[:1, self.out_channels :]
        elif folds and self.conv1.bias is not None:
            time, in_norm = self.conv1.bias[None], True  # the norm adds it for nothing
        h = self.norm2(self.conv1(self.norm1(x, skip=skip), add_bias=not in_norm), add=time)
        if folds and self.conv_shortcut is not None and biases is not None:
            return self.conv_shortcut(x, skip=skip, residual=self.conv2(h, add_bias=False), bias=biases[0])
        return self.conv2(h, residual=x if self.conv_shortcut is None else self.conv_shortcut(x, skip=skip))


class SelfAttention(nn.Module):
    """Multi-head attention of tokens to each other; q, k and v come from one product."""

    def __init__(self, channels: int, heads: int, qkv_bias: bool = False):
        super().__init__()
        self.heads = heads
        self.to_qkv = Linear(channels, 3 * channels, bias=qkv_bias, parts=("to_q", "to_k", "to_v"))
        self.to_out = nn.ModuleList([Linear(channels, channels)])

    def forward(self, x: torch.Tensor, perturbed: int = 0, **add_to: torch.Tensor) -> torch.Tensor:
        """`x` `[B, S, C]`. Returns attention(x) `[B, S, C]`, plus the `residual` or `into` of the last `Linear`.

        perturbed: in so many samples, the first, each token attends to itself alone.
        """
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)  # [B, S, heads, D] each
        out = flash_attn(q[perturbed:], k[perturbed:], v[perturbed:])
        out = out if not perturbed else torch.cat([v[:perturbed].flatten(2), out])
        return self.to_out[0](out, **add_to)


class CrossAttention(nn.Module):
    """Multi-head attention of tokens to the text; k and v depend on the text alone and are computed once per prompt."""

    def __init__(self, channels: int, context_channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = Linear(channels, channels, bias=False)
        self.to_kv = Linear(context_channels, 2 * channels, bias=False, parts=("to_k", "to_v"))
        self.to_out = nn.ModuleList([Linear(channels, channels)])

    def project_context(self, context: torch.Tensor) -> torch.Tensor:
        """`[B, L, context_channels]` to keys and values, `[B, L, 2, heads, D]`."""
        return self.to_kv(context).unflatten(-1, (2, self.heads, -1))

    def forward(self, x: torch.Tensor, key_value: KeyValue, **add_to: torch.Tensor) -> torch.Tensor:
        """`x` `[B, S, C]`, `key_value` from `project_context`, `residual` or `into` and result as `SelfAttention`.

        With image prompts, `key_value` is a tuple: the text's, then of each prompt its keys and values, which have an
        attention of their own (Ye et al. 2023, equation 5), and after them its mask `[1, S, 1]`, if it has one.
        """
        q = self.to_q(x).unflatten(-1, (self.heads, -1))
        if isinstance(key_value, torch.Tensor):
            k, v = key_value.unbind(2)
            return self.to_out[0](flash_attn(q, k, v), **add_to)
        text, *images = key_value
        k, v = text.unbind(2)
        out = flash_attn(q, k, v)
        for i, own in enumerate(images):
            if own.ndim == 5:
                mask = images[i + 1] if i + 1 < len(images) and images[i + 1].ndim == 3 else None
                k, v = own.unbind(2)
                added = flash_attn(q, k, v)
                out = out + added if mask is None else torch.addcmul(out, added, mask)
        return self.to_out[0](out, **add_to)


class GEGLU(nn.Module):
    """A projection to twice the width whose second half gates the first."""

    def __init__(self, channels: int, inner: int):
        super().__init__()
        self.proj = Linear(channels, 2 * inner)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.proj.bias is not None
        if self.proj.change is not None:
            value, gate = self.proj(x).chunk(2, dim=-1)
            return value * F.gelu(gate)
        if self.proj.scale is not None:
            return geglu_fp8(x, *self.proj.in_fp8(), self.proj.bias)
        return geglu(x, self.proj.weight, self.proj.bias)


class FeedForward(nn.Module):
    """The transformer's gated feed-forward; its hidden layer is four times as wide."""

    def __init__(self, channels: int):
        super().__init__()
        self.net = nn.ModuleDict({"0": GEGLU(channels, 4 * channels), "2": Linear(4 * channels, channels)})

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, into: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self.net["2"](self.net["0"](x), residual=residual, into=into)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; each with a norm before and a residual around it.

    On a GPU the last product of each is added to the residual in place. Their biases cannot be, so the first norm adds
    all three to the residual ahead, and the others take off those that are not due yet.
    """

    def __init__(self, channels: int, context_channels: int, heads: int):
        super().__init__()
        self.norm1 = LayerNorm(channels)
        self.attn1 = SelfAttention(channels, heads)
        self.norm2 = LayerNorm(channels)
        self.attn2 = CrossAttention(channels, context_channels, heads)
        self.norm3 = LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: torch.Tensor, key_value: KeyValue, perturbed: int = 0) -> torch.Tensor:
        """`perturbed`: of the self-attention."""
        if not dispatch.folds(x, self.norm1.weight):
            x = self.attn1(self.norm1(x), residual=x, perturbed=perturbed)
            x = self.attn2(self.norm2(x), key_value, residual=x)
            return self.ff(self.norm3(x), residual=x)
        biases = self.attn1.to_out[0].bias, self.attn2.to_out[0].bias, self.ff.net["2"].bias
        h, x = self.norm1(x, ahead=biases)
        x = self.attn1(h, into=x, perturbed=perturbed)
        x = self.attn2(self.norm2(x, owed=biases[1:]), key_value, into=x)
        return self.ff(self.norm3(x, owed=biases[2:]), into=x)


class SpatialTransformer(nn.Module):
    """A stack of transformer blocks over the pixels of a map (Rombach et al. 2022, appendix E.2.1)."""

    def __init__(self, channels: int, context_channels: int, heads: int, depth: int, groups: int):
        super().__init__()
        self.norm = GroupNorm(groups, channels, eps=1e-6, silu=False)
        self.proj_in = Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList(
            [TransformerBlock(channels, context_channels, heads) for _ in range(depth)]
        )
        self.proj_out = Linear(channels, channels)

    def forward(self, x: torch.Tensor, key_values: Sequence[KeyValue], perturbed: Sequence[int] = ()) -> torch.Tensor:
        """`x` `[B, H, W, C]`; `key_values` and `perturbed`, if it is given, have an entry for each of the blocks."""
        if dispatch.folds(x, self.norm.weight):
            h, total = self.norm(x, ahead=self.proj_out.bias)
            add_to = {"into": total.flatten(1, 2)}
        else:
            h, add_to = self.norm(x), {"residual": x.flatten(1, 2)}
        tokens = self.proj_in(h.flatten(1, 2))  # [B, S, C]
        for block, key_value, own in zip(self.transformer_blocks, key_values, perturbed or repeat(0)):
            tokens = block(tokens, key_value, own)
        return self.proj_out(tokens, **add_to).view(x.shape)


class Downsample(nn.Module):
    """Halve a map by a strided 3 x 3 convolution. The UNet pads all sides, the VAE only right and bottom."""

    def __init__(self, channels: int, padding: Padding = SAME):
        super().__init__()
        self.conv = Conv2d(channels, channels, stride=2, padding=padding)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Double a map: nearest neighbour, then a 3 x 3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels)

    def forward(self, x: torch.Tensor, size: torch.Size | None = None) -> torch.Tensor:
        """`size` (H, W) crops the last row or column where the skip connection has an odd size."""
        if size is None or tuple(size) == (2 * x.shape[1], 2 * x.shape[2]):
            return self.conv.after_doubling(x)
        return self.conv(upsample2x(x)[:, : size[0], : size[1]])


def timestep_embedding(timestep: torch.Tensor, channels: int, flip_sin_to_cos: bool, freq_shift: int) -> torch.Tensor:
    """Sinusoids of geometrically spaced frequencies (Vaswani et al. 2017, section 3.5).

    Args:
        timestep: `[N]`, any real numbers.
        channels: width of the result; even.
        flip_sin_to_cos: cosines first.
        freq_shift: the lowest frequency is 10000^(-(half - 1) / (half - freq_shift)), half = channels / 2.

    Returns:
        `[N, channels]`, fp32 (float64 where `timestep` is).
    """
    half = channels // 2
    t = timestep if timestep.dtype == torch.float64 else timestep.float()
    # In the order of operations of training: at t = 999 another rounding of the exponent moves the angle by 3e-5.
    exponent = -math.log(10000) * torch.arange(half, device=t.device, dtype=t.dtype) / (half - freq_shift)
    angle = t[:, None] * torch.exp(exponent)
    waves = (angle.cos(), angle.sin()) if flip_sin_to_cos else (angle.sin(), angle.cos())
    return torch.cat(waves, dim=-1)
