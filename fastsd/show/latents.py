"""`fastsd show latents`: the channels that the autoencoder makes of an image, and what goes where one is taken away."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from fastsd.image.drawing import enlarged, labelled, shrunk, stacked, titled
from fastsd.show.heat import channel
from fastsd.show.plot import Axis, Line, plot
from fastsd.show.scene import CELL, Scene

CHANNELS = 8  # at most
FEW, FINE, COARSE = 1000, 32, 12  # values below which the histogram has few bins; bins
RANGE = 4.0  # of the histogram, in standard deviations of the noise


def draw(scene: Scene) -> list[bytes]:
    """The image and its way back; each channel, the image without it; how the values are spread."""
    image = scene.subject()
    latents = scene.encode(image)
    back = scene.decode(latents)
    height, width, count = latents.shape[1:]
    rows = [
        [(_cell(image), "the image"), (_cell(back), "encoded and decoded"), (_apart(image, back), "4 x the difference")]
    ]
    for k in range(min(count, CHANNELS)):
        values = latents[0, ..., k]
        mean, deviation = float(values.mean()), float(values.std())
        without = latents.clone()
        without[..., k] = mean
        decoded = scene.decode(without)
        lowest, highest = float(values.min()), float(values.max())
        values_shown = channel(values.numpy(), lowest, highest, CELL)
        rows.append(
            [
                (values_shown, f"channel {k + 1}: {lowest:.2f}, violet, to {highest:.2f}, yellow"),
                (_cell(decoded), f"channel {k + 1} at its mean {mean:.2f} everywhere; deviation {deviation:.2f}"),
                (_apart(back, decoded), "4 x what is lost by that"),
            ]
        )
    ratio = image.width * image.height * 3 / latents.numel()
    note = f"{image.width} x {image.height} x 3 numbers become {width} x {height} x {count}: {ratio:.0f} times fewer."
    top = titled(labelled(rows, scene.theme, lines=3), f"The latents of an image in {scene.model}", [note], scene.theme)
    return [scene.png(stacked([top, _histogram(latents, scene)], scene.theme))]


def _histogram(latents: torch.Tensor, scene: Scene) -> Image.Image:
    """How the values of the first channels are spread, beside the noise that they are mixed with."""
    bins = COARSE if latents[0, ..., 0].numel() < FEW else FINE
    edges = np.linspace(-RANGE, RANGE, bins + 1)
    middle = ((edges[1:] + edges[:-1]) / 2).tolist()
    lines = []
    for k in range(min(latents.shape[-1], len(scene.theme.lines) - 1)):
        counts = np.histogram(latents[0, ..., k].numpy(), edges)[0]
        lines.append(Line(f"channel {k + 1}", middle, (counts / counts.sum().clip(1) / (edges[1] - edges[0])).tolist()))
    normal = np.exp(-0.5 * np.array(middle) ** 2) / np.sqrt(2 * np.pi)
    lines.append(Line("the noise, N(0, 1)", middle, normal.tolist(), dots=True, joined=False))
    title = "How the scaled latents are spread"
    return plot(lines, Axis("value"), Axis("density", 0), title, (560, 320), scene.theme)


def _cell(image: Image.Image) -> Image.Image:
    return enlarged(shrunk(image, 256), CELL)


def _apart(a: Image.Image, b: Image.Image) -> Image.Image:
    apart = np.abs(np.asarray(a.convert("RGB"), dtype=int) - np.asarray(b, dtype=int)) * 4
    return _cell(Image.fromarray(apart.clip(0, 255).astype(np.uint8)))
