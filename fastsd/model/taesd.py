"""The tiny autoencoder TAESD (Ollin Boer Bohan, github.com/madebyollin/taesd): convolutions and ReLU, no norms.

It was distilled from Stable Diffusion's autoencoder. Its latents are those that the diffusion model sees, already
scaled, so its own scaling factor is 1. Internally, images are in [0, 1].
"""

from __future__ import annotations

import torch
from torch import nn

from fastsd.config import AutoencoderConfig, TAESDConfig
from fastsd.errors import FastsdError
from fastsd.model.layers import Conv2d
from fastsd.model.vae import AutoencoderKL, Gaussian

# The log variance of a deterministic latent: its standard deviation, exp(-500), is 0 in fp32. Every dtype can hold it.
NO_VARIANCE = -1000.0
DECODES_ONLY = "the autoencoder is only TAESD's decoder; put the file of its encoder beside the decoder's"
LATENT_BOUND = 3.0  # the decoder bounds its input by this


class TAESDBlock(nn.Module):
    """Three convolutions with ReLU and a shortcut."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.ModuleDict({name: Conv2d(channels, channels) for name in ("0", "2", "4")})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv["0"](x, relu=True)
        h = self.conv["2"](h, relu=True)
        return self.conv["4"](h, residual=x, relu=True)


class UpsampleConv(Conv2d):
    """Double a map by nearest neighbour, then convolve it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]  # never has a residual
        return self.after_doubling(x)


class TAESDEncoder(nn.Module):
    """Image `[B, H, W, 3]` in [-1, 1] to its scaled latent `[B, H/f, W/f, latent_channels]`."""

    def __init__(self, config: TAESDConfig):
        super().__init__()
        width = config.block_out_channels[0]
        layers: list[nn.Module] = []
        for level, blocks in enumerate(config.num_encoder_blocks):
            halving = Conv2d(width, width, stride=2, bias=False)
            layers.append(Conv2d(config.in_channels, width) if level == 0 else halving)
            layers += [TAESDBlock(width) for _ in range(blocks)]
        self.layers = nn.ModuleList([*layers, Conv2d(width, config.latent_channels)])

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = (image + 1) / 2
        for layer in self.layers:
            x = layer(x)
        return x


class TAESDDecoder(nn.Module):
    """Scaled latent `[B, h, w, latent_channels]` to image `[B, h * f, w * f, 3]`, about [-1, 1]."""

    def __init__(self, config: TAESDConfig):
        super().__init__()
        width, last = config.block_out_channels[0], len(config.num_decoder_blocks) - 1
        # Layers have a checkpoint's numbers, which count the ReLU after the first convolution and each upsampling too.
        self.layers = nn.ModuleDict({"0": Conv2d(config.latent_channels, width)})
        number = 2
        for level, blocks in enumerate(config.num_decoder_blocks):
            for _ in range(blocks):
                self.layers[str(number)] = TAESDBlock(width)
                number += 1
            if level < last:
                self.layers[str(number + 1)] = UpsampleConv(width, width, bias=False)
            else:
                self.layers[str(number)] = Conv2d(width, config.out_channels)
            number += 2

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        first, *rest = self.layers.values()
        x = first(LATENT_BOUND * torch.tanh(latent / LATENT_BOUND), relu=True)
        for layer in rest:
            x = layer(x)
        return 2 * x - 1


class TAESD(nn.Module):
    """Encoder and decoder, or only the decoder, with the methods of `AutoencoderKL`.

    Args:
        config: of encoder and decoder.
        encodes: whether it has an encoder.
    """

    def __init__(self, config: TAESDConfig, encodes: bool = True):
        super().__init__()
        self.config = config
        self.encoder = TAESDEncoder(config) if encodes else None
        self.decoder = TAESDDecoder(config)

    def encode(self, image: torch.Tensor) -> Gaussian:
        """`[B, H, W, 3]` in [-1, 1], H and W multiples of `config.downscale`, to its latent, without variance.

        Raises:
            FastsdError: it has no encoder.
        """
        if self.encoder is None:
            raise FastsdError(DECODES_ONLY)
        mean = self.encoder(image)
        return Gaussian(mean, torch.full_like(mean, NO_VARIANCE))

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """`[B, h, w, latent_channels]` to `[B, H, W, 3]`, about [-1, 1], not clipped."""
        return self.decoder(latent)


Autoencoder = AutoencoderKL | TAESD


def make_autoencoder(config: AutoencoderConfig) -> Autoencoder:
    """The autoencoder for a config."""
    return TAESD(config) if isinstance(config, TAESDConfig) else AutoencoderKL(config)
