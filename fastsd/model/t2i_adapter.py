"""T2I-Adapter: an image's features, which the UNet adds to those of its levels (Mou et al. 2023, section 3.2).

Unlike a ControlNet it reads neither latent, time nor text, so it runs once a call.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from fastsd.config import T2IAdapterConfig, UNetConfig
from fastsd.model.layers import Conv2d, Linear


class AdapterBlock(nn.Module):
    """Two convolutions with ReLU between them, and a residual; the second is 3 x 3 in light adapters, else 1 x 1."""

    def __init__(self, channels: int, light: bool):
        super().__init__()
        self.block1 = Conv2d(channels, channels)
        self.block2 = Conv2d(channels, channels) if light else Linear(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block2(self.block1(x, relu=True), residual=x)


class AdapterLevel(nn.Module):
    """The blocks of one resolution, in light adapters on a quarter of the channels."""

    def __init__(self, in_channels: int, channels: int, blocks: int, light: bool, halves: bool):
        super().__init__()
        width = channels // 4 if light else channels
        self.halves = halves
        self.in_conv = Linear(in_channels, width) if light or in_channels != channels else None
        self.resnets = nn.ModuleList([AdapterBlock(width, light) for _ in range(blocks)])
        self.out_conv = Linear(width, channels) if light else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` `[1, h, w, C]`, halved first (rounded up) where the level does."""
        if self.halves:
            x = F.avg_pool2d(x.permute(0, 3, 1, 2), 2, ceil_mode=True).permute(0, 2, 3, 1).contiguous()
        if self.in_conv is not None:
            x = self.in_conv(x)
        for block in self.resnets:
            x = block(x)
        return x if self.out_conv is None else self.out_conv(x)


class T2IAdapter(nn.Module):
    """Computes maps of the UNet's levels from an image. Submodules are named as in a diffusers folder."""

    def __init__(self, config: T2IAdapterConfig):
        super().__init__()
        self.config = config
        pixels = config.in_channels * config.downscale**2
        widths = (pixels if config.light else config.channels[0], *config.channels)
        self.conv_in = None if config.light else Conv2d(pixels, config.channels[0])
        self.body = nn.ModuleList(
            [
                AdapterLevel(before, width, config.blocks, config.light, halves)
                for before, width, halves in zip(widths, config.channels, config.halves)
            ]
        )

    @property
    def weight(self) -> torch.Tensor:
        """One of its weights, of their precision and device."""
        return next(self.parameters())

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """An image `[1, H, W, in_channels]` in [0, 1] to the maps `[1, h, w, C]` that `UNet.denoise` adds.

        Sides that are no multiple of `downscale` are filled up with the pixels of the edge.
        """
        size = self.config.downscale
        missing = [-side % size for side in (image.shape[2], image.shape[1])]
        x = F.pad(image.permute(0, 3, 1, 2), (0, missing[0], 0, missing[1]), mode="replicate")
        x = F.pixel_unshuffle(x, size).permute(0, 2, 3, 1).contiguous()
        x = x if self.conv_in is None else self.conv_in(x)
        maps = []
        for level in self.body:
            maps.append(x := level(x))
        return tuple(maps)


def adapter_downscale(unet: UNetConfig, downscale: int) -> int:
    """Pixels per pixel of the first map of an adapter for a UNet.

    downscale: pixels per pixel of the latent. The first map is added after the first level's transformers; without
    them, as in SDXL, after the level has halved its map.
    """
    return downscale if unet.down_depths(0) else 2 * downscale
