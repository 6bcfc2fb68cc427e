"""The KL-regularised autoencoder between images and latents (Rombach et al. 2022, appendix G.1)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from fastsd.config import VAEConfig
from fastsd.kernels import dispatch
from fastsd.model.layers import Conv2d, Downsample, GroupNorm, Linear, ResBlock, SelfAttention, Upsample


class Gaussian(NamedTuple):
    """A diagonal Gaussian over latents: `mean` and `logvar`, `[B, h, w, C]` each, unscaled."""

    mean: torch.Tensor
    logvar: torch.Tensor

    def mode(self) -> torch.Tensor:
        return self.mean

    def sample(self, noise: torch.Tensor) -> torch.Tensor:
        """The sample for standard normal `noise` of the same shape (the reparameterisation trick)."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise


class AttentionBlock(SelfAttention):
    """Self-attention with one head over all pixels of a map, with a norm before it and a residual around it."""

    def __init__(self, channels: int, groups: int, eps: float):
        super().__init__(channels, heads=1, qkv_bias=True)
        self.group_norm = GroupNorm(groups, channels, eps, silu=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]  # always has a residual, `x`
        """`[B, H, W, C]` to the same shape."""
        if dispatch.folds(x, self.group_norm.weight):
            h, total = self.group_norm(x, ahead=self.to_out[0].bias)
            return super().forward(h.flatten(1, 2), into=total.flatten(1, 2)).view(x.shape)
        return super().forward(self.group_norm(x).flatten(1, 2), residual=x.flatten(1, 2)).view(x.shape)


class VAELevel(nn.Module):
    """Residual blocks of one resolution and, except at the last level, the resampling to the next."""

    def __init__(self, config: VAEConfig, inputs: list[int], channels: int):
        super().__init__()
        self.resnets = nn.ModuleList([ResBlock(n, channels, config.norm_num_groups, config.norm_eps) for n in inputs])
        self.downsamplers: nn.ModuleList | None = None
        self.upsamplers: nn.ModuleList | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        for resample in (self.downsamplers, self.upsamplers):
            if resample is not None:
                x = resample[0](x)
        return x


class MidBlock(nn.Module):
    """Two residual blocks at the lowest resolution, with attention between them."""

    def __init__(self, config: VAEConfig, channels: int):
        super().__init__()
        groups, eps = config.norm_num_groups, config.norm_eps
        self.resnets = nn.ModuleList([ResBlock(channels, channels, groups, eps) for _ in range(2)])
        self.attentions = nn.ModuleList([AttentionBlock(channels, groups, eps)] if config.mid_block_attention else [])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class VAEEncoder(nn.Module):
    """Image `[B, H, W, 3]` to the moments of its latent `[B, H/f, W/f, 2 * latent_channels]`."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = config.block_out_channels
        self.conv_in = Conv2d(config.in_channels, widths[0])
        self.down_blocks = nn.ModuleList()
        below = widths[0]
        for i, width in enumerate(widths):
            level = VAELevel(config, [below] + [width] * (config.layers_per_block - 1), width)
            if i < len(widths) - 1:
                level.downsamplers = nn.ModuleList([Downsample(width, padding=(0, 1, 0, 1))])
            self.down_blocks.append(level)
            below = width
        self.mid_block = MidBlock(config, below)
        self.conv_norm_out = GroupNorm(config.norm_num_groups, below, config.norm_eps, silu=True)
        self.conv_out = Conv2d(below, 2 * config.latent_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(self.conv_norm_out(self.mid_block(x)))


class VAEDecoder(nn.Module):
    """Latent `[B, h, w, latent_channels]` to image `[B, h * f, w * f, 3]`."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = config.block_out_channels[::-1]
        self.conv_in = Conv2d(config.latent_channels, widths[0])
        self.mid_block = MidBlock(config, widths[0])
        self.up_blocks = nn.ModuleList()
        below = widths[0]
        for i, width in enumerate(widths):
            level = VAELevel(config, [below] + [width] * config.layers_per_block, width)
            if i < len(widths) - 1:
                level.upsamplers = nn.ModuleList([Upsample(width)])
            self.up_blocks.append(level)
            below = width
        self.conv_norm_out = GroupNorm(config.norm_num_groups, below, config.norm_eps, silu=True)
        self.conv_out = Conv2d(below, config.out_channels)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(self.conv_norm_out(x))


class AutoencoderKL(nn.Module):
    """Encoder and decoder. Latents here are unscaled; the diffusion model sees them times `config.scaling_factor`."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = VAEEncoder(config)
        self.decoder = VAEDecoder(config)
        self.quant_conv = Linear(2 * config.latent_channels, 2 * config.latent_channels)
        self.post_quant_conv = Linear(config.latent_channels, config.latent_channels)

    def encode(self, image: torch.Tensor) -> Gaussian:
        """`[B, H, W, 3]` in [-1, 1], H and W multiples of `config.downscale`, to the distribution of its latent."""
        mean, logvar = self.quant_conv(self.encoder(image)).chunk(2, dim=-1)
        return Gaussian(mean, logvar.clamp(-30.0, 20.0))

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """`[B, h, w, latent_channels]`, unscaled, to `[B, H, W, 3]`, about [-1, 1], not clipped."""
        return self.decoder(self.post_quant_conv(latent))
