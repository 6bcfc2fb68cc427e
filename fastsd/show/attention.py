"""`fastsd show attention`: where each word looks, by step and by layer, and what one pixel looks at."""

from __future__ import annotations

import torch
from PIL import Image, ImageDraw

from fastsd.errors import FastsdError
from fastsd.image.drawing import enlarged, labelled, shrunk, stacked, titled
from fastsd.show.capture import AttentionRecord, recorded, short_name
from fastsd.show.heat import Floats, overlay
from fastsd.show.scene import CELL, Scene, spread

WORDS, STEPS, LAYERS = 8, 6, 8  # at most


def draw(scene: Scene) -> list[bytes]:
    """Three tables of maps over the generated image: words by steps, words by layers, and a pixel's by layers."""
    image, record, words = capture(scene)
    cell = enlarged(shrunk(image, 256), CELL)
    grid = (max(h for h, _ in record.shapes.values()), max(w for _, w in record.shapes.values()))
    calls = len(next(iter(record.cross.values())))
    chosen = words[:WORDS]
    by_step = [
        [_cell(cell, mean_map(record, list(record.cross), [k], tokens, grid), f'"{word}", call {k + 1} of {calls}')
         for k in spread(calls, STEPS)] for word, tokens in chosen
    ]  # fmt: skip
    layers = [list(record.cross)[k] for k in spread(len(record.cross), LAYERS)]
    by_layer = [
        [_cell(cell, mean_map(record, [layer], range(calls), tokens, grid), f'"{word}", {_size(record, layer)}')
         for layer in layers] for word, tokens in chosen
    ]  # fmt: skip
    left = f" The first {WORDS} of {len(words)} words." if len(words) > WORDS else ""
    parts = [
        titled(
            labelled(by_step, scene.theme, lines=3),
            f'Where each word of "{scene.prompt}" looks in {scene.model}, by step',
            [f"Cross-attention, mean over heads and layers; yellow is each map's highest value, given below it.{left}"],
            scene.theme,
        ),
        titled(labelled(by_layer, scene.theme, lines=3), "By layer", ["Mean over heads and steps."], scene.theme),
        _own(scene, record, cell, calls),
    ]
    return [scene.png(stacked(parts, scene.theme))]


def capture(scene: Scene) -> tuple[Image.Image, AttentionRecord, list[tuple[str, list[int]]]]:
    """Generate with the attention noted.

    Returns:
        The image, the record, and the words with the positions of their tokens.

    Raises:
        FastsdError: the pixel is outside of the image; there are no words.
    """
    words = find_words(scene)
    width, height, scale = scene.size()
    x, y = scene.pixel or (width // 2, height // 2)
    if x >= width or y >= height:
        raise FastsdError(f"lies outside of the image of {width} x {height}", argument="--pixel", value=f"{x},{y}")
    scene.pixel = (x, y)
    at = ((x + 0.5) / width, (y + 0.5) / height)
    with recorded(scene.pipe.components.unet, (height // scale, width // scale), at) as record:
        image = scene.generate()
    if not record.cross:
        raise FastsdError(f"{scene.model} has no cross-attention", argument="--model")
    return image, record, words


def find_words(scene: Scene) -> list[tuple[str, list[int]]]:
    """The words of the prompt, each with the positions of its tokens; position 0 is the start of the text.

    Raises:
        FastsdError: the prompt has no words.
    """
    tokens = scene.pipe.components.tokenizers[0].tokens(scene.prompt)
    words: list[tuple[str, list[int]]] = []
    fresh = True
    for position, token in enumerate(tokens, 1):
        text = token.removesuffix("</w>")
        if fresh:
            words.append((text, [position]))
        else:
            words[-1] = (words[-1][0] + text, [*words[-1][1], position])
        fresh = token.endswith("</w>")
    if not words:
        raise FastsdError("has no words to look at", argument="--prompt", value=scene.prompt)
    return words


def mean_map(
    record: AttentionRecord, layers: list[str], calls: list[int] | range, tokens: list[int], grid: tuple[int, int]
) -> Floats:
    """How much pixels look at a word, `grid` in size: the sum over its tokens, the mean over layers and calls."""
    maps = []
    for layer in layers:
        noted = torch.stack([record.cross[layer][k] for k in calls])
        tokens = [token for token in tokens if token < noted.shape[-1]]
        values = noted[..., tokens].sum(-1).mean(0).view(1, 1, *record.shapes[layer])
        maps.append(torch.nn.functional.interpolate(values, size=grid, mode="bilinear", align_corners=False)[0, 0])
    found: Floats = torch.stack(maps).mean(0).numpy()
    return found


def _cell(image: Image.Image, values: Floats, label: str) -> tuple[Image.Image, str]:
    highest = float(values.max())
    return overlay(image, values, highest), f"{label}: up to {highest:.2g}"


def _size(record: AttentionRecord, layer: str) -> str:
    height, width = record.shapes[layer]
    return f"{short_name(layer)} ({width} x {height})"


def _own(scene: Scene, record: AttentionRecord, cell: Image.Image, calls: int) -> Image.Image:
    """Maps of what the chosen pixel looks at, by layer, the pixel marked."""
    assert scene.pixel is not None
    width, height, _ = scene.size()
    at = (scene.pixel[0] + 0.5) / width * cell.width, (scene.pixel[1] + 0.5) / height * cell.height
    cells = []
    for layer in [list(record.own)[k] for k in spread(len(record.own), LAYERS)]:
        values = torch.stack(record.own[layer]).mean(0).view(record.shapes[layer]).numpy()
        drawn, label = _cell(cell, values, _size(record, layer))
        pen = ImageDraw.Draw(drawn)
        for radius, colour in ((6, (0, 0, 0)), (5, (255, 255, 255)), (4, (220, 30, 30))):
            pen.ellipse([at[0] - radius, at[1] - radius, at[0] + radius, at[1] + radius], outline=colour, width=1)
        cells.append((drawn, label))
    at_pixel = f"({scene.pixel[0]}, {scene.pixel[1]})"
    note = f"Self-attention, mean over heads and {calls} calls. The circle is the pixel {at_pixel}."
    return titled(labelled([cells], scene.theme, lines=3), "What one pixel looks at, by layer", [note], scene.theme)
