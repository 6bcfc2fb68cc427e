"""Chapter 9: rings made smaller by four filters. docs/upscaling.md: letters enlarged by a small network."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from book.figures.style import figure, show_image
from fastsd import Upscaler
from fastsd.model.upscalers import CompactConfig, CompactNet

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
STEPS, PATCHES, SIDE = 600, 16, 16  # of the training; pixels of a small patch's side
FILTERS = ("NEAREST", "BILINEAR", "BICUBIC", "LANCZOS")


def resizing() -> Figure:
    """A zone plate: rings that get finer outwards, to beyond what the small image can show."""
    side = 512
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    rings = (127.5 + 127.5 * np.cos((x**2 + y**2) * np.pi / (1.4 * side))).astype(np.uint8)
    large = Image.fromarray(rings)
    fig, axes = figure(2.4, 1, len(FILTERS))
    for one, name in zip(axes, FILTERS):
        small = large.resize((side // 4, side // 4), Image.Resampling[name])
        show_image(one, np.asarray(small) / 255, name.lower())
    fig.suptitle(
        "Rings of 512 × 512 at a quarter of the size: only nearest shows rings that are not there", fontsize=10
    )
    return fig


def upscaling() -> Figure:
    """Letters that the network was not trained on, at half their size, and made twice as large again."""
    large = _sheet(LETTERS.lower(), 96, seed=1)
    small = large.resize((48, 48), Image.Resampling.BOX)
    shown = {
        "nearest": small.resize((96, 96), Image.Resampling.NEAREST),
        "lanczos": small.resize((96, 96), Image.Resampling.LANCZOS),
        "network": _trained()(small),
        "the large one": large,
    }
    fig, axes = figure(2.3, 1, len(shown))
    for one, (name, image) in zip(axes, shown.items(), strict=True):
        off = np.abs(np.asarray(image, dtype=float) - np.asarray(large)).mean()
        show_image(one, np.asarray(image), name if image is large else f"{name}: off by {off:.1f} of 255")
    return fig


def _sheet(letters: str, side: int, seed: int) -> Image.Image:
    """Letters of many sizes and colours, all over an image."""
    chance = np.random.default_rng(seed)
    sheet = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(sheet)
    for _ in range(side**2 // 500):
        place, colour = chance.integers(-10, side, 2), chance.integers(0, 200, 3)
        font = ImageFont.load_default(size=int(chance.integers(12, 60)))
        draw.text(tuple(map(int, place)), chance.choice(list(letters)), tuple(map(int, colour)), font)
    return sheet


def _trained() -> Upscaler:
    """The compact network in its smallest form, trained on capital letters in seconds."""
    torch.manual_seed(0)
    network = CompactNet(CompactConfig(features=16, convolutions=2, scale=2))
    torch.nn.init.zeros_(network.get_parameter("body.6.weight"))  # it starts as nearest neighbour
    torch.nn.init.zeros_(network.get_parameter("body.6.bias"))
    large = torch.from_numpy(np.array(_sheet(LETTERS, 768, seed=0))).float()[None] / 255
    small = F.avg_pool2d(large.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
    optimiser = torch.optim.Adam(network.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
    for _ in range(STEPS):
        places = torch.randint(384 - SIDE, (PATCHES, 2)).tolist()
        inputs = torch.cat([small[:, y : y + SIDE, x : x + SIDE] for y, x in places])
        wanted = torch.cat([large[:, 2 * y : 2 * (y + SIDE), 2 * x : 2 * (x + SIDE)] for y, x in places])
        optimiser.zero_grad()
        F.l1_loss(network(inputs), wanted).backward()
        optimiser.step()
        schedule.step()
    return Upscaler(network.eval().requires_grad_(False), "letters")
