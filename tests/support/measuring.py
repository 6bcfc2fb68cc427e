"""A folder of images with captions, and a stand-in for a model that returns them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "white": (250, 250, 250)}
SHAPES = ("disc", "bar", "frame", "cross", "half")
SIDE = 32


def shape(colour: str, form: str, side: int = SIDE) -> Image.Image:
    """A form of one colour on black."""
    y, x = np.mgrid[0:side, 0:side] - (side - 1) / 2
    r = side / 3
    where = {
        "disc": x**2 + y**2 < r**2,
        "bar": abs(y) < r / 3,
        "frame": (np.maximum(abs(x), abs(y)) < r) & (np.maximum(abs(x), abs(y)) > r / 2),
        "cross": abs(x) - abs(y) < 1,
        "half": x < 0,
    }[form]
    pixels = np.zeros((side, side, 3), np.uint8)
    pixels[where] = COLOURS[colour]
    return Image.fromarray(pixels)


def write_shapes(folder: Path, labels: bool = True) -> Path:
    """Twenty images, two captions each; the frames are said to be held out."""
    folder.mkdir(parents=True)
    lines = []
    for number, (colour, form) in enumerate((c, f) for c in COLOURS for f in SHAPES):
        shape(colour, form).save(folder / f"{number}.png")
        row: dict[str, Any] = {"file_name": f"{number}.png", "text": [f"{colour} {form}", f"a {form}, {colour}"]}
        if labels:
            row["label"] = number % 10
        if form == "frame":
            row["held_out"] = "parts"
        lines.append(json.dumps(row))
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


class Painter:
    """Paints what the caption says, except the colours of `wrong`, which come out blue; with noise of a seed."""

    def __init__(self, wrong: tuple[str, ...] = (), noise: float = 2.0):
        self.wrong, self.noise = wrong, noise
        self.calls: list[tuple[list[str], int, dict[str, Any]]] = []

    def __call__(self, prompts: list[str], seed: int, batch_size: int, **settings: Any) -> Any:
        self.calls.append((prompts, seed, settings))
        images = []
        for number, prompt in enumerate(prompts):
            colour = next(word for word in COLOURS if word in prompt)
            form = next(word for word in SHAPES if word in prompt)
            pixels = np.asarray(shape("blue" if colour in self.wrong else colour, form), float)
            noise = np.random.default_rng(seed + number).normal(size=pixels.shape) * self.noise
            images.append(Image.fromarray((pixels + noise).clip(0, 255).round().astype(np.uint8)))
        return SimpleNamespace(images=images)


def stand_in(*models: Painter) -> Callable[..., Painter]:
    """In the place of `Pipeline.from_pretrained`: the model that its path numbers, "0"."""
    return lambda path=None, **_: models[int(path)]
