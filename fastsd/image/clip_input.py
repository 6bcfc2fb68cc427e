"""An image as CLIP's vision tower reads it: its middle square, shrunk, with CLIP's mean and deviation."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)


def clip_input(image: Image.Image, size: int) -> torch.Tensor:
    """`[1, size, size, 3]` fp32: the shorter side to `size` by bicubic interpolation, then the middle of the longer.

    The same numbers as transformers' CLIPImageProcessor, up to rounding in fp32.
    """
    image = image.convert("RGB")
    width, height = image.size
    short, long = min(width, height), max(width, height)
    other = int(size * long / short)
    image = image.resize((size, other) if width <= height else (other, size), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.float32) / np.float32(255)
    normal = (pixels - np.array(MEAN, dtype=np.float32)) / np.array(DEVIATION, dtype=np.float32)
    return torch.from_numpy(normal)[None]
