"""The perceptual distance LPIPS, from weights that the user has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastsd.errors import FastsdError
from fastsd.weights.formats.open_file import read_tensors

# The convolutions of VGG-16's five blocks by their place in torchvision's `features`, and the widths of the blocks. A
# block ends before the pool that the next one begins with.
BLOCKS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
WIDTHS = (64, 128, 256, 512, 512)
# Mean and deviation of ImageNet's colours, for pixels in [-1, 1]; in the file as `scaling_layer`.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
FLOATS: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}


class Lpips(nn.Module):
    """Features of VGG-16 (Simonyan and Zisserman 2015), compared as Zhang et al. 2018 do ("The unreasonable
    effectiveness of deep features as a perceptual metric", equation 1). Frozen."""

    shift: torch.Tensor
    scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        channels = 3
        for places, width in zip(BLOCKS, WIDTHS):
            convolutions = []
            for _ in places:
                convolutions.append(nn.Conv2d(channels, width, 3, padding=1, **FLOATS))
                channels = width
            self.blocks.append(nn.ModuleList(convolutions))
        self.weights = nn.ParameterList([nn.Parameter(torch.zeros(width, **FLOATS)) for width in WIDTHS])
        self.register_buffer("shift", torch.tensor(SHIFT, **FLOATS))
        self.register_buffer("scale", torch.tensor(SCALE, **FLOATS))
        self.requires_grad_(False)

    def features(self, image: torch.Tensor) -> list[torch.Tensor]:
        """`[B, H, W, 3]` in [-1, 1] to each block's map `[B, C, h, w]`, of length 1 at every place."""
        x = ((image - self.shift) / self.scale).permute(0, 3, 1, 2)
        found = []
        for number, block in enumerate(self.blocks):
            x = F.max_pool2d(x, 2) if number else x
            for convolution in block:  # type: ignore[attr-defined]
                x = F.relu(convolution(x))
            found.append(x.float() / (x.float().square().sum(1, keepdim=True).sqrt() + 1e-10))
        return found

    def forward(self, image: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """The distances `[B]` fp32 of two batches of images `[B, H, W, 3]` in [-1, 1]; gradients reach `other`."""
        with torch.no_grad():
            wanted = self.features(image)
        distances = []
        for a, b, weight in zip(wanted, self.features(other), self.weights):
            distances.append(((a - b).square() * weight[:, None, None]).sum(1).mean((1, 2)))
        return torch.stack(distances).sum(0)


def load_lpips(path: Path) -> Lpips:
    """The network with the weights of a file, in the layout of the package lpips with `net="vgg"`: what
    `lpips.LPIPS(net="vgg").state_dict()` holds, as .safetensors, or as torch.save writes it.

    Raises:
        FastsdError: the file cannot be read, holds more than tensors, or others.
    """
    entries, _ = read_tensors(path, allow_pickle=True)
    network = Lpips()
    wanted: dict[str, torch.Tensor] = {}
    for block, places in enumerate(BLOCKS):
        for convolution, place in zip(network.blocks[block], places):  # type: ignore[call-overload]
            wanted[f"net.slice{block + 1}.{place}.weight"] = convolution.weight
            wanted[f"net.slice{block + 1}.{place}.bias"] = convolution.bias
        wanted[f"lin{block}.model.1.weight"] = network.weights[block][None, :, None, None]
    for key, target in wanted.items():
        shape = list(entries[key].shape) if key in entries else None
        if shape != list(target.shape):
            what = "is missing" if shape is None else f"is {shape}, not {list(target.shape)}"
            raise FastsdError(
                f'no LPIPS on VGG-16: {key} {what}; lpips.LPIPS(net="vgg").state_dict() holds all of it', path=path
            )
        with torch.no_grad():
            target.copy_(entries[key].read())
    return network
