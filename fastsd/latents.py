"""Noise, pictures and masks as the latents that the denoising loop works on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageFilter

from fastsd.graph import Graphs
from fastsd.model.tiling import encode_tiled
from fastsd.model.vae import AutoencoderKL

FEATHER = 4  # pixels over which an inpainted region fades into the kept picture, inside the mask


class Noise:
    """Standard normal noise, from one CPU generator for each image.

    An image's noise depends on its seed alone: not on the device, the batch, or its place in the batch.
    """

    def __init__(self, seeds: Sequence[int], channels: int, height: int, width: int, device: torch.device):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.shape = (channels, height, width)
        self.device = device

    def draw(self) -> torch.Tensor:
        """The next noise of every image, `[N, h, w, C]` fp32."""
        drawn = torch.stack([torch.randn(self.shape, generator=generator) for generator in self.generators])
        return to_channels_last(drawn).to(self.device)


def to_channels_last(x: torch.Tensor) -> torch.Tensor:
    """`[N, C, H, W]` to contiguous `[N, H, W, C]`."""
    return x.permute(0, 2, 3, 1).contiguous()


def image_tensor(image: Image.Image) -> torch.Tensor:
    """An RGB picture as `[1, H, W, 3]` fp32 in [-1, 1]."""
    return torch.from_numpy(np.array(image, dtype=np.float32)).div_(127.5).sub_(1.0)[None]


def encode_image(
    vae: AutoencoderKL, image: torch.Tensor, noise: Noise, tiled: bool, graphs: Graphs | None = None
) -> torch.Tensor:
    """One picture to a sampled, scaled latent for every image of `noise`.

    Args:
        vae: the autoencoder.
        image: `[1, H, W, 3]` in [-1, 1].
        noise: where the samples are drawn from.
        tiled: encode in overlapping tiles.
        graphs: where the captured encoder is kept; None runs it eagerly.

    Returns:
        `[N, h, w, C]` fp32.
    """
    weight = vae.quant_conv.weight
    image = image.to(weight.device, weight.dtype)
    run = Graphs() if graphs is None else graphs
    mean, logvar = encode_tiled(vae, image) if tiled else run("encode", vae.encode, image)
    mean, std = mean.float(), torch.exp(0.5 * logvar.float())
    return (mean + std * noise.draw()) * vae.config.scaling_factor


@dataclass(frozen=True)
class InpaintMask:
    """Which part of a picture is painted anew.

    Attributes:
        pixels: `[1, H, W, 1]` fp32, 1 where the picture is painted anew.
        latents: `[1, h, w, 1]`, 1 where any pixel under the latent pixel is.
        feathered: picture-sized, 0 outside the mask, rising to 255 over `FEATHER` pixels inside it.
    """

    pixels: torch.Tensor
    latents: torch.Tensor
    feathered: Image.Image

    @classmethod
    def from_image(cls, mask: Image.Image, downscale: int) -> InpaintMask:
        """`mask`: one channel; 128 and above is painted anew."""
        binary = mask.point([0] * 128 + [255] * 128)
        pixels = torch.from_numpy(np.array(binary, dtype=np.float32) / 255.0)[None, None]
        latents = torch.nn.functional.max_pool2d(pixels, downscale)
        return cls(to_channels_last(pixels), to_channels_last(latents), feather(binary))

    def compose(self, original: Image.Image, painted: Image.Image) -> Image.Image:
        """`painted` inside the mask; outside it `original`, to the bit."""
        return Image.composite(painted, original, self.feathered)


def feather(binary: Image.Image) -> Image.Image:
    """Soften a mask towards its inside: a blur is one half at the edge; what is above one half is stretched."""
    blurred = np.asarray(binary.filter(ImageFilter.GaussianBlur(FEATHER / 2)), dtype=np.float32) / 255.0
    inside = np.clip(blurred * 2.0 - 1.0, 0.0, 1.0) * (np.asarray(binary) > 0)
    return Image.fromarray((inside * 255.0).round().astype(np.uint8))
