"""What the digits model is asked for, its drawings as arrays, and the sheet of them that the README shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from fastsd.train.captions import DIGIT_WORDS

if TYPE_CHECKING:
    from fastsd.pipeline import Pipeline

Progress = Callable[[str], None]

# The prompt of each end of an attribute, in the order of `STYLE_WORDS`: low, high.
STYLE_PROMPTS = {
    "thickness": ("a thin {}", "a thick {}"),
    "slant": ("{} slanted left", "{} slanted right"),
    "size": ("a small {}", "a large {}"),
}
CELL, GAP, LABEL = 64, 2, 150
BATCH = 50  # drawn together; changes the speed, not the pictures


@dataclass(frozen=True)
class Drawn:
    """Drawings with what was asked for: `pictures` `[N, H, W]` float32 in [0, 1], `digits` `[N]`."""

    pictures: torch.Tensor
    digits: NDArray[np.int64]


def plain_prompt(digit: int, index: int) -> str:
    """`8`, `eight` and `a handwritten eight` in turn; "an" where it belongs."""
    name = DIGIT_WORDS[digit]
    return (str(digit), name, f"a handwritten {name}")[index % 3]


def style_prompt(form: str, digit: int) -> str:
    """`form` of a digit by name: "a thin eight"."""
    return form.format(DIGIT_WORDS[digit])


def draw(pipe: Pipeline, prompt: Callable[[int, int], str], seeds: int) -> Drawn:
    """Each digit `seeds` times, at the model's default settings; the n-th picture of all has seed n.

    Args:
        prompt: from a digit and the number of the drawing, 0 to seeds - 1.
    """
    prompts = [prompt(digit, k) for digit in range(10) for k in range(seeds)]
    pictures = [
        grey(pipe(prompts[i : i + BATCH], seed=i, batch_size=BATCH, output_type="np").images)
        for i in range(0, len(prompts), BATCH)
    ]
    return Drawn(torch.cat(pictures), np.repeat(np.arange(10), seeds))


def grey(images: NDArray[np.floating]) -> torch.Tensor:
    """`[N, H, W, 3]` in [0, 1] to `[N, H, W]`: the mean of the channels, which training has equal."""
    return torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32)).mean(-1)


def sheet(pipe: Pipeline) -> Image.Image:
    """Ten digits in eight rows: two plain ones, then every style word. A column keeps its noise from row 2 on."""
    rows: list[tuple[str, Callable[[int, int], str], int]] = [
        ("handwritten", lambda d, _: plain_prompt(d, 2), 10),
        ("handwritten", lambda d, _: plain_prompt(d, 2), 0),
    ]
    for forms in STYLE_PROMPTS.values():
        rows += [(form.replace("{}", "").split(" ", 1)[-1].strip(), _styled(form), 0) for form in forms]
    width = LABEL + 10 * (CELL + GAP)
    canvas = Image.new("RGB", (width, len(rows) * (CELL + GAP)), "white")
    pen = ImageDraw.Draw(canvas)
    for y, (words, prompt, first) in enumerate(rows):
        top = y * (CELL + GAP)
        pen.text((LABEL - 12, top + CELL // 2), words, fill="black", anchor="rm", font_size=18)
        images = pipe([prompt(digit, 0) for digit in range(10)], seed=first).images
        for digit, image in enumerate(images):
            canvas.paste(image.resize((CELL, CELL)), (LABEL + digit * (CELL + GAP), top))
    return canvas


def _styled(form: str) -> Callable[[int, int], str]:
    return lambda digit, _: style_prompt(form, digit)


def draw_styles(pipe: Pipeline, seeds: int, progress: Progress) -> dict[str, tuple[Drawn, Drawn]]:
    """For each attribute the drawings at its low and its high word, paired: same digits, same seeds."""
    drawn = {}
    for name, (low, high) in STYLE_PROMPTS.items():
        progress(f"drawing {low.format('N')} and {high.format('N')}, {10 * seeds} each")
        drawn[name] = draw(pipe, _styled(low), seeds), draw(pipe, _styled(high), seeds)
    return drawn
