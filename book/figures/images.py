"""Chapter 9: rings made smaller by four filters."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from book.figures.style import figure, show_image

FILTERS = ("NEAREST", "BILINEAR", "BICUBIC", "LANCZOS")


def resizing() -> Figure:
    """A zone plate: rings that get finer outwards, to beyond what the small image can show."""
    side = 512
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    rings = (127.5 + 127.5 * np.cos((x**2 + y**2) * np.pi / (1.4 * side))).astype(np.uint8)
    large = Image.fromarray(rings)
    fig, axes = figure(2.4, 1, len(FILTERS))
    for one, name in zip(axes, FILTERS):
        small = large.resize((side // 4, side // 4), Image.Resampling[name])
        show_image(one, np.asarray(small) / 255, name.lower())
    fig.suptitle(
        "Rings of 512 × 512 at a quarter of the size: only nearest shows rings that are not there", fontsize=10
    )
    return fig
