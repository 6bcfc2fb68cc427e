"""Chapters 2, 4 and 6: between two latents; the UNet by its config; guidance. What the emoji model generates."""

from __future__ import annotations

import textwrap

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

import fastsd
from book.figures.style import COLOURS, figure, show_image
from fastsd.config import UNetConfig

EMOJI = (
    *("a red heart", "woman firefighter", "thumbs up with dark skin tone", "pickup truck", "flag of japan"),
    *("red apple", "cat face", "a rocket", "man dancing with light skin tone", "guard with medium skin tone"),
    *("couple with heart, dark skin tone, light skin tone", "astronaut with medium skin tone", "grinning face"),
    *("smiling face with sunglasses", "flag of norway", "pizza"),
)
MIXTURE = 0.3  # the deviation of each half of the model in one dimension


def between() -> Figure:
    """Decoded points on the line between two latents, and under them the mixed pixels."""
    pipe = fastsd.Pipeline.from_pretrained(device="cpu", dtype="fp32")
    texts = (("a handwritten eight", 7), ("a handwritten one", 1))
    images = [pipe(text, seed=seed, output_type="pt").images for text, seed in texts]
    shares = torch.linspace(0, 1, 7)
    with torch.no_grad():
        ends = [pipe.components.vae.encode((2 * image - 1).permute(0, 2, 3, 1)).mean for image in images]
        decoded = pipe.components.vae.decode(torch.cat([torch.lerp(*ends, share) for share in shares]))
    fig, axes = figure(2.7, 2, len(shares))
    for k, share in enumerate(shares):
        show_image(axes[0, k], ((decoded[k] + 1) / 2).clamp(0, 1), f"{share:.2f}")
        mixed = torch.lerp(images[0][0], images[1][0], float(share)).permute(1, 2, 0)
        show_image(axes[1, k], mixed)
    for row, name in enumerate(("latents", "pixels")):
        axes[row, 0].text(-0.15, 0.5, name, transform=axes[row, 0].transAxes, rotation=90, va="center", ha="right")
    return fig


def emoji() -> Figure:
    """Images of the bundled emoji model with their captions, all of seed 0; the last one is not right."""
    pipe = fastsd.Pipeline.from_pretrained("emoji", device="cpu", dtype="fp32")
    fig, axes = figure(3.7, 2, len(EMOJI) // 2)
    for one, caption in zip(axes.flat, EMOJI, strict=True):
        show_image(one, pipe(caption, seed=0).images[0], textwrap.fill(caption, 15))
    return fig


def _blocks(config: UNetConfig) -> list[tuple[str, int, str]]:
    """Every part of a UNet from left to right: (side, level, kind), kind "conv", "block" or "transformer"."""
    levels = range(len(config.block_out_channels))
    parts = [("down", 0, "conv")]
    for level in levels:
        kind = "transformer" if any(config.down_depths(level)) else "block"
        parts += [("down", level, kind)] * config.layers_per_block
        parts += [("down", level, "conv")] * (level < levels[-1])
    parts += [("middle", levels[-1], "transformer")]
    for level in reversed(levels):
        kind = "transformer" if any(config.down_depths(level)) else "block"
        parts += [("up", level, kind)] * (config.layers_per_block + 1)
    return parts


def unet(config: UNetConfig | None = None, size: int = 64, name: str = "Stable Diffusion 1.5") -> Figure:
    """The blocks of a UNet: its height the map's side, shrunk; an arrow for each map that is kept."""
    config = UNetConfig() if config is None else config
    colours = {"transformer": COLOURS[0], "block": COLOURS[7], "conv": COLOURS[4]}
    fig, axes = figure(4.2)
    x, last, places = 0.0, "down", []
    for side, level, kind in _blocks(config):
        x += 0.4 * (side != last)
        wide, height = (0.2 if kind == "conv" else 0.6), 3.2 * 0.62**level
        axes.add_patch(Rectangle((x, -height / 2), wide, height, facecolor=colours[kind], alpha=0.85))
        places.append((x + wide / 2, level, side))
        x, last = x + wide + 0.12, side
    kept = [place for place in places if place[2] == "down"]
    for (left, level, _), (right, other, _) in zip(kept, reversed([place for place in places if place[2] == "up"])):
        ends = (left, 1.6 * 0.62**level), (right, 1.6 * 0.62**other)
        arrow = {"arrowstyle": "-|>", "mutation_scale": 8, "color": "#777777", "linewidth": 0.7}
        axes.add_patch(FancyArrowPatch(*ends, connectionstyle="arc3,rad=-0.15", **arrow))
    for level, width in enumerate(config.block_out_channels):
        for side in ("down", "up"):
            at = np.mean([place[0] for place in places if place[1:] == (level, side)])
            axes.text(at, -1.9, f"{width}\n{size >> level}²", ha="center", va="top", fontsize=9)
    axes.text(-0.4, -1.9, "channels\nmap", ha="right", va="top", fontsize=9)
    names = {"transformer": "residual block, transformer", "block": "residual block", "conv": "convolution"}
    for k, (kind, label) in enumerate(names.items()):
        axes.add_patch(Rectangle((-1.5, 3.15 - 0.38 * k), 0.3, 0.22, color=colours[kind], alpha=0.85))
        axes.text(-1.1, 3.15 - 0.38 * k, label, fontsize=9)
    axes.set(xlim=(-1.8, x), ylim=(-2.8, 3.8), title=f"The UNet of {name}. Arrows: maps that are kept and read again")
    axes.axis("off")
    return fig


def _denoise(x: torch.Tensor, sigma: torch.Tensor, share: torch.Tensor | float) -> torch.Tensor:
    """E[x0 | x] of a mixture of N(-1, MIXTURE^2) and N(1, MIXTURE^2), the right half with probability `share`."""
    variance = MIXTURE**2 + sigma**2
    right, left = ((MIXTURE**2 * x + sigma**2 * sign) / variance for sign in (1, -1))
    return share * right + (1 - share) * left


def _guided(scale: float, count: int = 40_000, steps: int = 400) -> np.ndarray:
    x = 100 * torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    levels = torch.tensor([100 * (1 - i / steps) ** 7 for i in range(steps + 1)], dtype=torch.float64)
    for sigma, below in zip(levels, levels[1:]):
        both = _denoise(x, sigma, torch.sigmoid(2 * x / (MIXTURE**2 + sigma**2)))
        x = x + (below - sigma) * (x - both - scale * (_denoise(x, sigma, 1.0) - both)) / sigma
    return x.numpy()


def guidance() -> Figure:
    """One seed at four guidance scales; and what guidance does to the images of one number."""
    pipe = fastsd.Pipeline.from_pretrained(device="cpu", dtype="fp32")
    scales = (1.0, 2.0, 4.0, 8.0)
    fig, axes = figure(4.2)
    axes.remove()
    grid = fig.add_gridspec(2, len(scales), height_ratios=(1, 1.4))
    for k, scale in enumerate(scales):
        image = pipe("a thick five slanted right", seed=3, guidance_scale=scale, output_type="np").images[0]
        show_image(fig.add_subplot(grid[0, k]), image, f"guidance {scale:g}")
    below = fig.add_subplot(grid[1, :])
    bins = np.linspace(-2, 2.5, 226)
    for scale in (1.0, 2.0, 4.0):
        below.hist(_guided(scale), bins, density=True, histtype="step", linewidth=1.4, label=f"guidance {scale:g}")
    below.set(xlabel="image (one number)", ylabel="density", xlim=(-0.5, 2.5))
    below.set_title("Images of the caption “right”, a Gaussian around 1 with deviation 0.3")
    below.legend(loc="upper left")
    return fig
