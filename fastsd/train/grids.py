"""Sample grids."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

SMALLEST = 96  # pixels; smaller images are enlarged so that they can be looked at
GAP = 2


def rows_of_images(rows: Sequence[torch.Tensor]) -> Image.Image:
    """Rows of images, one above the other.

    Args:
        rows: `[n, H, W, 3]` in [-1, 1] each, all of one size.
    """
    height, width = rows[0].shape[1:3]
    times = max(1, -(-SMALLEST // height))
    columns = max(len(row) for row in rows)
    canvas = np.full(
        (len(rows) * (height * times + GAP) + GAP, columns * (width * times + GAP) + GAP, 3), 128, np.uint8
    )
    for y, row in enumerate(rows):
        pixels = ((row.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()
        for x, image in enumerate(pixels.repeat(times, 1).repeat(times, 2)):
            top, left = GAP + y * (height * times + GAP), GAP + x * (width * times + GAP)
            canvas[top : top + height * times, left : left + width * times] = image
    return Image.fromarray(canvas)
