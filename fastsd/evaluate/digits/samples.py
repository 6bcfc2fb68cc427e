"""Prompts for the digits model, the images generated from them, and the contact sheet in the README."""

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
Prompt = Callable[[int, int], str]  # of a digit and the index of the image, 0 to seeds - 1

# The prompt for each end of an attribute, in the order of `STYLE_WORDS`: low, high.
STYLE_PROMPTS = {
    "thickness": ("a thin {}", "a thick {}"),
    "slant": ("{} slanted left", "{} slanted right"),
    "size": ("a small {}", "a large {}"),
}
CELL, GAP, LABEL = 64, 2, 150  # pixels of the contact sheet
BATCH = 50  # affects the speed, not the images


@dataclass(frozen=True)
class GeneratedDigits:
    """Generated images and the digits of their prompts: `images` `[N, H, W]` float32 in [0, 1], `digits` `[N]`."""

    images: torch.Tensor
    digits: NDArray[np.int64]


def plain_prompt(digit: int, index: int) -> str:
    """`8`, `eight` and `a handwritten eight` in turn."""
    name = DIGIT_WORDS[digit]
    return (str(digit), name, f"a handwritten {name}")[index % 3]


def style_prompt(form: str, digit: int) -> str:
    """`form` with the name of a digit: "a thin eight"."""
    return form.format(DIGIT_WORDS[digit])


def generate_digits(pipe: Pipeline, prompt: Prompt, seeds: int) -> GeneratedDigits:
    """Generate each digit `seeds` times, at the default settings of the model; the n-th image has seed n."""
    prompts = [prompt(digit, k) for digit in range(10) for k in range(seeds)]
    images = [
        grey(pipe(prompts[i : i + BATCH], seed=i, batch_size=BATCH, output_type="np").images)
        for i in range(0, len(prompts), BATCH)
    ]
    return GeneratedDigits(torch.cat(images), np.repeat(np.arange(10), seeds))


def grey(images: NDArray[np.floating]) -> torch.Tensor:
    """`[N, H, W, 3]` in [0, 1] to `[N, H, W]`: the mean of the channels, which are equal in the training images."""
    return torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32)).mean(-1)


def contact_sheet(pipe: Pipeline) -> Image.Image:
    """Ten digits in eight rows: two plain, then one for each style word. From row 2 on, a column shares its noise."""
    rows: list[tuple[str, Prompt, int]] = [
        ("handwritten", lambda d, _: plain_prompt(d, 2), 10),
        ("handwritten", lambda d, _: plain_prompt(d, 2), 0),
    ]
    for forms in STYLE_PROMPTS.values():
        rows += [(form.replace("{}", "").split(" ", 1)[-1].strip(), _styled(form), 0) for form in forms]
    width = LABEL + 10 * (CELL + GAP)
    canvas = Image.new("RGB", (width, len(rows) * (CELL + GAP)), "white")
    pen = ImageDraw.Draw(canvas)
    for y, (words, prompt, first_seed) in enumerate(rows):
        top = y * (CELL + GAP)
        pen.text((LABEL - 12, top + CELL // 2), words, fill="black", anchor="rm", font_size=18)
        images = pipe([prompt(digit, 0) for digit in range(10)], seed=first_seed).images
        for digit, image in enumerate(images):
            canvas.paste(image.resize((CELL, CELL)), (LABEL + digit * (CELL + GAP), top))
    return canvas


def _styled(form: str) -> Prompt:
    return lambda digit, _: style_prompt(form, digit)


def generate_styles(
    pipe: Pipeline, seeds: int, progress: Progress
) -> dict[str, tuple[GeneratedDigits, GeneratedDigits]]:
    """For each attribute, images with its low and its high word, paired: same digits, same seeds."""
    generated = {}
    for name, (low, high) in STYLE_PROMPTS.items():
        progress(f"generating {low.format('N')} and {high.format('N')}, {10 * seeds} images each")
        generated[name] = generate_digits(pipe, _styled(low), seeds), generate_digits(pipe, _styled(high), seeds)
    return generated
