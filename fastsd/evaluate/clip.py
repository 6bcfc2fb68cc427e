"""A CLIP model of both towers, to score how well an image fits its caption (Radford et al. 2021; Hessel et al. 2021).

It reads a folder as transformers writes it: config.json, model.safetensors, and the tokenizer's files.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from fastsd.errors import FastsdError
from fastsd.evaluate.images import BATCH, Pixels, batches
from fastsd.image.clip_input import clip_input
from fastsd.model.clip import TextEncoder
from fastsd.model.tokenizer import Tokenizer
from fastsd.model.vision import VisionEncoder
from fastsd.weights.formats.json_file import ConfigReader
from fastsd.weights.layouts.configs import read_clip
from fastsd.weights.layouts.vision import PREFIXES, load_vision
from fastsd.weights.load import fill, read_headers

# transformers' defaults, which the part of a whole CLIP's config that is about texts may leave out.
TEXT_DEFAULTS = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
# Of a whole CLIP, beside the towers.
OTHERS = ("logit_scale", "text_model.embeddings.position_ids")
PLACE: tuple[torch.dtype, torch.device] = (torch.float32, torch.device("cpu"))


@dataclass(frozen=True)
class Clip:
    """A CLIP model with its tokenizer: texts and images to unit vectors `[N, D]` float64."""

    text: TextEncoder
    vision: VisionEncoder
    tokenizer: Tokenizer

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> NDArray[np.float64]:
        parts = [self.text(self.tokenizer(list(texts[i : i + BATCH]))).pooled for i in range(0, len(texts), BATCH)]
        return F.normalize(torch.cat(parts).double(), dim=1).numpy()

    @torch.inference_mode()
    def look(self, images: torch.Tensor) -> torch.Tensor:
        """`[N, H, W, 3]` uint8 to vectors `[N, D]`, not normalised."""
        size = self.vision.config.image_size
        return self.vision(torch.cat([clip_input(Image.fromarray(image.numpy()), size) for image in images])).embedding

    def images(self, images: Iterable[Pixels]) -> NDArray[np.float64]:
        parts = [self.look(torch.from_numpy(np.stack(part))) for part in batches(images)]
        return F.normalize(torch.cat(parts).double(), dim=1).numpy()

    def scores(self, images: Iterable[Pixels], texts: Sequence[str]) -> NDArray[np.float64]:
        """100 max(cos, 0) of each image and its text (Hessel et al. 2021, with torchmetrics' factor)."""
        found: NDArray[np.float64] = 100 * (self.images(images) * self.texts(texts)).sum(1).clip(0)
        return found


def load_clip(folder: Path) -> Clip:
    """The model in a folder.

    Raises:
        FastsdError: a file is missing or damaged, or they are those of another model.
    """
    path, weights = folder / "config.json", weights_of(folder)
    r = ConfigReader(path)
    own: dict[str, Any] = {}
    for name in ("text_config", "vision_config"):
        if not isinstance(part := r.data.get(name), dict):
            raise FastsdError(f"has no {name}; a CLIP model of both towers has", path=path)
        own[name] = part
    config = read_clip(path, TEXT_DEFAULTS | own["text_config"])
    config = replace(config, projection_dim=r.get("projection_dim", int, 512))
    vision = load_vision(folder, *PLACE)
    entries = {k: v for k, v in read_headers([weights]).items() if k not in OTHERS and not k.startswith(PREFIXES)}
    with torch.device("meta"):
        text = TextEncoder(config)
    return Clip(fill(text, entries, weights, *PLACE), vision, Tokenizer(folder))


def weights_of(folder: Path) -> Path:
    """The file of a folder's weights.

    Raises:
        FastsdError: there is none.
    """
    path = folder / "model.safetensors"
    if not path.is_file():
        raise FastsdError(
            "no such file; a folder of CLIP holds config.json, model.safetensors and a tokenizer", path=path
        )
    return path
