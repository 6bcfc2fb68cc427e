"""Networks that enlarge images: ESRGAN's, of residual dense blocks, and Real-ESRGAN's compact one.

Images are `[B, H, W, C]` in [0, 1], in the order red, green, blue.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from fastsd.model.layers import Conv2d

SLOPE = 0.2  # of the leaky ReLU
SHARE = 0.2  # of what a block adds to its input: "residual scaling" in the paper
CONVOLUTIONS = 5  # of a dense block


@dataclass(frozen=True)
class RRDBConfig:
    """ESRGAN's upscaler (Wang et al. 2018, section 3.1), with Real-ESRGAN's pixel unshuffle (Wang et al. 2021).

    Attributes:
        channels: of the image.
        features: channels of the trunk.
        growth: channels that each convolution of a dense block adds.
        blocks: of three dense blocks each.
        doublings: of the map, after the trunk.
        unshuffle: squares of as many pixels a side become channels before it; 1: none.
        plus: dense blocks have ESRGAN+'s shortcuts (Rakotonirina and Rasoanaivo 2020).
    """

    channels: int = 3
    features: int = 64
    growth: int = 32
    blocks: int = 23
    doublings: int = 2
    unshuffle: int = 1
    plus: bool = False

    @property
    def scale(self) -> int:
        """Pixels of the result for a pixel, along one side."""
        return 2**self.doublings // self.unshuffle

    @property
    def radius(self) -> int:
        """How far a result sees: its pixels of the image lie within this distance.

        Each 3 x 3 convolution adds a pixel of its map: 15 a block, 2 around the trunk, and those after it, on larger
        maps, less than 2.
        """
        return (15 * self.blocks + 4) * self.unshuffle

    @property
    def numbers_a_pixel(self) -> int:
        """Numbers that a forward pass holds at its peak for a pixel of the image: a rough upper bound.

        A dense block holds its input, that of its block and that of the trunk, what it has added, a copy of all of it
        and what a convolution makes of that; after the trunk there are three maps of the largest size.
        """
        trunk = 6 * self.features + 2 * (self.features + 4 * self.growth)
        return max(trunk, 3 * self.features * 4**self.doublings) // self.unshuffle**2


@dataclass(frozen=True)
class CompactConfig:
    """Real-ESRGAN's compact upscaler (SRVGGNetCompact): convolutions at the image's size, and one pixel shuffle.

    Attributes:
        channels: of the image.
        features: channels of the maps.
        convolutions: between the first and the last.
        scale: pixels of the result for a pixel, along one side.
    """

    channels: int = 3
    features: int = 64
    convolutions: int = 16
    scale: int = 4
    unshuffle: ClassVar[int] = 1

    @property
    def radius(self) -> int:
        """As of `RRDBConfig`: a pixel for each convolution."""
        return self.convolutions + 2

    @property
    def numbers_a_pixel(self) -> int:
        """As of `RRDBConfig`: three maps, or the last one and its shuffled copies."""
        return max(3 * self.features, self.features + 3 * self.channels * self.scale**2)


UpscalerConfig = RRDBConfig | CompactConfig


class DenseBlock(nn.Module):
    """Five convolutions, each of which reads the input and what those before it added (Wang et al. 2018, figure 4).

    With ESRGAN+'s shortcuts, the second adds a 1 x 1 convolution of the input, and the fourth what the second gave.
    """

    def __init__(self, config: RRDBConfig):
        super().__init__()
        features, growth = config.features, config.growth
        for i in range(1, CONVOLUTIONS):
            setattr(self, f"conv{i}", Conv2d(features + (i - 1) * growth, growth))
        self.conv5 = Conv2d(features + 4 * growth, features)
        self.conv1x1 = Conv2d(features, growth, 1, padding=(0, 0, 0, 0), bias=False) if config.plus else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = [x]
        for i in range(1, CONVOLUTIONS):
            y = F.leaky_relu_(getattr(self, f"conv{i}")(torch.cat(maps, -1)), SLOPE)
            if self.conv1x1 is not None and i in (2, 4):
                y += self.conv1x1(x) if i == 2 else maps[2]
            maps.append(y)
        return torch.add(x, self.conv5(torch.cat(maps, -1)), alpha=SHARE)


class ResidualDenseBlocks(nn.Module):
    """Three dense blocks with a shortcut around them: the paper's RRDB."""

    def __init__(self, config: RRDBConfig):
        super().__init__()
        self.rdb1, self.rdb2, self.rdb3 = (DenseBlock(config) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.add(x, self.rdb3(self.rdb2(self.rdb1(x))), alpha=SHARE)


class RRDBNet(nn.Module):
    """ESRGAN's generator: a trunk at the image's size, then doublings by nearest neighbour, each with a convolution.

    Parameters have the names of Real-ESRGAN's files (`conv_first`, `body.0.rdb1.conv1`, ...).
    """

    def __init__(self, config: RRDBConfig):
        super().__init__()
        self.config = config
        features = config.features
        self.conv_first = Conv2d(config.channels * config.unshuffle**2, features)
        self.body = nn.ModuleList(ResidualDenseBlocks(config) for _ in range(config.blocks))
        self.conv_body = Conv2d(features, features)
        for i in range(1, config.doublings + 1):
            setattr(self, f"conv_up{i}", Conv2d(features, features))
        self.conv_hr = Conv2d(features, features)
        self.conv_last = Conv2d(features, config.channels)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """`[B, H, W, C]`, whose sides `unshuffle` divides, to `[B, scale H, scale W, C]`."""
        x = F.pixel_unshuffle(image.permute(0, 3, 1, 2), self.config.unshuffle).permute(0, 2, 3, 1).contiguous()
        x = y = self.conv_first(x)
        for block in self.body:
            y = block(y)
        x = x + self.conv_body(y)
        for i in range(1, self.config.doublings + 1):
            x = F.leaky_relu_(getattr(self, f"conv_up{i}").after_doubling(x), SLOPE)
        return self.conv_last(F.leaky_relu_(self.conv_hr(x), SLOPE))


class ChannelSlopes(nn.Module):
    """ReLU with a learned slope below zero for each channel (PReLU, He et al. 2015)."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels,), 0.25, dtype=torch.float32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.prelu(x.permute(0, 3, 1, 2), self.weight).permute(0, 2, 3, 1)


class CompactNet(nn.Module):
    """Real-ESRGAN's SRVGGNetCompact: what it computes is added to the image enlarged by nearest neighbour."""

    def __init__(self, config: CompactConfig):
        super().__init__()
        self.config = config
        layers: list[nn.Module] = [Conv2d(config.channels, config.features), ChannelSlopes(config.features)]
        for _ in range(config.convolutions):
            layers += [Conv2d(config.features, config.features), ChannelSlopes(config.features)]
        self.body = nn.ModuleList([*layers, Conv2d(config.features, config.channels * config.scale**2)])

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """`[B, H, W, C]` to `[B, scale H, scale W, C]`."""
        x = image
        for layer in self.body:
            x = layer(x)
        x = x + image.repeat_interleave(self.config.scale**2, dim=-1)  # a channel's square lies side by side
        return F.pixel_shuffle(x.permute(0, 3, 1, 2), self.config.scale).permute(0, 2, 3, 1)


UpscalerNetwork = RRDBNet | CompactNet


def make_network(config: UpscalerConfig) -> UpscalerNetwork:
    """The network of a config, with random weights."""
    return RRDBNet(config) if isinstance(config, RRDBConfig) else CompactNet(config)
