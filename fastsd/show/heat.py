"""Numbers as colours: maps of one channel, and maps laid over an image."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Floats = NDArray[np.floating]
# Dark violet, blue, teal, green, yellow: lightness grows evenly, so that the order shows without colour too.
_STOPS = np.array([[48, 18, 84], [62, 74, 137], [38, 130, 142], [80, 190, 110], [253, 231, 55]], dtype=np.float64)


def colours(values: Floats) -> NDArray[np.uint8]:
    """`[h, w]` in [0, 1] to `[h, w, 3]`."""
    at = np.clip(values, 0, 1) * (len(_STOPS) - 1)
    low = np.minimum(at.astype(int), len(_STOPS) - 2)
    share = (at - low)[..., None]
    return (_STOPS[low] * (1 - share) + _STOPS[low + 1] * share).round().astype(np.uint8)


def channel(values: Floats, low: float, high: float, width: int) -> Image.Image:
    """A map of one channel, `low` dark violet and `high` yellow, its values as squares."""
    scaled = (values - low) / max(high - low, 1e-12)
    image = Image.fromarray(colours(scaled))
    factor = max(1, width // image.width)
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def overlay(image: Image.Image, values: Floats, highest: float) -> Image.Image:
    """`values` `[h, w]` as colours over a grey version of `image`: the higher, the more of the colour covers it.

    Args:
        highest: the value that gets the last colour.
    """
    small = Image.fromarray((np.clip(values / max(highest, 1e-12), 0, 1) * 255).astype(np.uint8))
    share = np.asarray(small.resize(image.size, Image.Resampling.BILINEAR), dtype=np.float64) / 255
    grey = np.asarray(image.convert("L"), dtype=np.float64)[..., None]
    grey = 40 + grey * 0.6  # neither black nor white, so that both ends of the colours differ from it
    cover = (0.15 + 0.75 * share)[..., None]
    return Image.fromarray((grey * (1 - cover) + colours(share) * cover).round().astype(np.uint8))
