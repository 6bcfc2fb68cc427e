"""What the drawings share: the model, the image they are about, the colours."""

from __future__ import annotations

import argparse
import importlib
import io
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastsd.bundled import DIGITS
from fastsd.config import SchedulerConfig
from fastsd.errors import FastsdError
from fastsd.generate.latents import Codec, image_tensor
from fastsd.generate.lora_flags import adapters_of, put_on, titled_with
from fastsd.generate.progress import Step
from fastsd.generate.settings_text import parse_settings
from fastsd.graph import Graphs
from fastsd.image.drawing import THEMES, Theme
from fastsd.image.files import open_image
from fastsd.parameters.kinds import MAX_SEED
from fastsd.pipeline import Pipeline
from fastsd.runtime.devices import undisturbed

PROMPT = "a handwritten eight"  # of the bundled model
CELL = 128  # pixels of an image in a strip


@dataclass
class Scene:
    """The flags, resolved.

    Attributes:
        model: its name for titles.
        palette: write 256 colours.
        pixel: (x, y) of the image, or None for the middle.
    """

    pipe: Pipeline
    model: str
    prompt: str
    image: Image.Image | None
    seed: int
    settings: dict[str, Any]
    pixel: tuple[int, int] | None
    theme: Theme
    palette: bool = False
    _codec: Codec = field(init=False)

    def __post_init__(self) -> None:
        self._codec = Codec(self.pipe.components.vae, Graphs())

    @classmethod
    def of(cls, args: argparse.Namespace) -> Scene:
        """Load the model and the image that the flags name.

        Raises:
            FastsdError: no such model or image, bad settings, no prompt for a model but the digits.
        """
        settings = parse_settings(args.settings, "--settings")
        pixel = None if args.pixel is None else _pixel(args.pixel)
        image = None if args.image is None else open_image(args.image, "--image")
        if not 0 <= args.seed <= MAX_SEED:
            raise FastsdError("it should be a whole number from 0 on", argument="--seed", value=args.seed)
        prompt = args.prompt
        if prompt is None:
            if args.model != DIGITS and args.kind != "schedule" and image is None:
                raise FastsdError("needs what to generate", argument="--prompt")
            prompt = PROMPT
        adapters = adapters_of(args.lora or ())
        pipe = Pipeline.from_pretrained(args.model, device=args.device, dtype=args.dtype, graphs=False)
        if adapters:
            for note in put_on(pipe, adapters, args):
                print(f"note: {note}", file=sys.stderr)
        unet = pipe.components.unet.config
        if unet.in_channels != unet.out_channels and image is None and args.kind != "schedule":
            raise FastsdError(
                "generates from an image, which is not drawn here; forward and latents with --image are, and schedule",
                argument="--model",
                path=args.model,
            )
        title = titled_with(pipe.components.name, adapters)
        return cls(pipe, title, prompt, image, args.seed, settings, pixel, THEMES[args.theme], args.palette)

    def png(self, image: Image.Image) -> bytes:
        """The bytes of a PNG."""
        if self.palette:
            image = image.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
        stream = io.BytesIO()
        image.save(stream, "PNG", optimize=True)
        return stream.getvalue()

    @property
    def scheduler(self) -> SchedulerConfig:
        return self.pipe.components.scheduler

    def stream(self) -> Iterator[Step]:
        """A generation, step by step; `result` is set in the last."""
        arguments = {"prompt_syntax": "plain"} | self.settings
        return self.pipe.stream(self.prompt, seed=self.seed, **arguments)

    def generate(self) -> Image.Image:
        """The image of the prompt."""
        last = deque(self.stream(), maxlen=1).pop()
        assert last.result is not None
        image: Image.Image = last.result.images[0]
        return image

    def size(self) -> tuple[int, int, int]:
        """Width and height of a generated image, and how many pixels a latent pixel stands for."""
        components = self.pipe.components
        scale = components.vae.config.downscale
        width, height = (
            self.settings.get(name) or self.pipe.defaults.get(name) or components.sample_size * scale
            for name in ("width", "height")
        )
        return width, height, scale

    def subject(self) -> Image.Image:
        """The image that is looked at: the file's, with sides that the autoencoder takes, or a generated one."""
        if self.image is None:
            return self.generate()
        unit = self.pipe.components.vae.config.downscale
        width, height = (max(unit, side // unit * unit) for side in self.image.size)
        if width * height > 1024 * 1024:
            raise FastsdError("has more than 1024 x 1024 pixels; make it smaller", argument="--image")
        return self.image.crop((0, 0, width, height))

    @torch.inference_mode()
    def encode(self, image: Image.Image) -> torch.Tensor:
        """An image to scaled latents `[1, h, w, C]` fp32, the mode of their distribution."""
        with undisturbed():
            return self._codec.scale(self._codec.mode(image_tensor(image), tiled=False)).cpu()

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> Image.Image:
        """Scaled latents `[1, h, w, C]` to an image."""
        with undisturbed():
            return Image.fromarray(self._codec.decode(latents.to(self.pipe.device), tiled=False)[0])


def as_colours(latents: torch.Tensor) -> Image.Image:
    """Latents `[1, h, w, C]` as an image: the first three channels, -3 to 3, as red, green and blue."""
    values = latents[0, ..., :3].float().cpu().numpy()
    if values.shape[-1] < 3:
        values = np.repeat(values[..., :1], 3, -1)
    return Image.fromarray(((values / 6 + 0.5).clip(0, 1) * 255).round().astype(np.uint8))


def spread(count: int, most: int) -> list[int]:
    """At most `most` of `count` indices, evenly spread, the first and the last among them."""
    most = min(most, count)
    return sorted({round(k * (count - 1) / max(most - 1, 1)) for k in range(most)})


def draw(kind: str, scene: Scene) -> list[bytes]:
    """The files of a kind of drawing: a PNG, and an animation after it where there is one."""
    module = importlib.import_module(f"fastsd.show.{kind}")
    found: list[bytes] = module.draw(scene)
    return found


def _pixel(text: str) -> tuple[int, int]:
    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdecimal() and len(part) < 9 for part in parts):
        raise FastsdError("it should be X,Y, two whole numbers from 0 on", argument="--pixel", value=text)
    return int(parts[0]), int(parts[1])
