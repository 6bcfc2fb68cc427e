"""Measures behind the style words: thickness, slant and size of white strokes on black."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]

# For each attribute, the word for its low end and the word for its high end.
STYLE_WORDS = {"thickness": ("thin", "thick"), "slant": ("slanted left", "slanted right"), "size": ("small", "large")}


@dataclass(frozen=True)
class Strokes:
    """Measures of N images, `[N]` float32 each.

    Attributes:
        width: stroke width, in pixels.
        slant: horizontal shift per pixel of height; positive leans to the right, as most handwriting does.
        size: height of the bounding box, in pixels.
    """

    width: Float32
    slant: Float32
    size: Float32

    @property
    def thickness(self) -> Float32:
        """Stroke width divided by height, so that "thin" does not depend on size."""
        return (self.width / np.maximum(self.size, 1)).astype(np.float32)


def measure(images: NDArray[np.generic]) -> Strokes:
    """Measure white strokes on black.

    Width: 2 * area / outline. A stroke of width w and length l has area w * l and an outline of about 2 * l, so this is
    w where l is much larger than w (and exactly w for a ring). The outline is the total variation of the image, which
    by the coarea formula is the mean length of its level lines over all grey levels. It needs no threshold, and blurred
    edges measure the same as sharp ones. Slant: -m_xy / m_yy (second central moments, y downwards), the shear that
    makes x and y uncorrelated. Size: the rows from the first to the last with a pixel of at least half of white.

    Args:
        images: `[N, H, W]`, uint8 in [0, 255] or float in [0, 1].

    Returns:
        The measures; all zero for an empty image.
    """
    if images.dtype == np.uint8:
        x = images.astype(np.float32) / 255
    else:
        x = images.astype(np.float32)
    height, width = x.shape[1:]
    area = x.sum((1, 2))
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
    # Both differences are taken at the corner that four pixels share, so all directions weigh about the same.
    right = padded[:, :, 1:] - padded[:, :, :-1]
    down = padded[:, 1:] - padded[:, :-1]
    right, down = (right[:, 1:] + right[:, :-1]) / 2, (down[:, :, 1:] + down[:, :, :-1]) / 2
    outline = np.sqrt(right**2 + down**2).sum((1, 2))

    mass = np.maximum(area, 1e-6)
    by_row, by_column = x.sum(2), x.sum(1)
    rows, columns = np.arange(height, dtype=np.float32), np.arange(width, dtype=np.float32)
    row, column = by_row @ rows / mass, by_column @ columns / mass
    m_yy = by_row @ rows**2 / mass - row**2
    m_xy = np.einsum("nhw,h,w->n", x, rows, columns, optimize=True) / mass - row * column

    bright = x.max(2) >= 0.5
    size = np.where(bright.any(1), height - bright[:, ::-1].argmax(1) - bright.argmax(1), 0)
    return Strokes(
        width=(2 * area / np.maximum(outline, 1e-6)).astype(np.float32),
        slant=(-m_xy / np.maximum(m_yy, 1e-6)).astype(np.float32),
        size=size.astype(np.float32),
    )


def extremes(values: Float32, labels: NDArray[np.generic], share: float) -> NDArray[np.int8]:
    """Mark the images at the low end (-1) and at the high end (+1) of a measure, within each label.

    The measures depend on the shape: a 1 has less ink than an 8, a 7 has more slant than a 0. Compared within its
    label, a style word describes the style and says nothing about the digit.

    Args:
        values: `[N]`. labels: `[N]`. share: of the images of each label, at each end.

    Returns:
        `[N]`, -1, 0 or 1.
    """
    ends = np.zeros(len(values), dtype=np.int8)
    for label in np.unique(labels):
        of_label = labels == label
        low, high = np.quantile(values[of_label], (share, 1 - share))
        ends[of_label & (values < low)] = -1
        ends[of_label & (values > high)] = 1
    return ends


def styles(strokes: Strokes, labels: NDArray[np.generic], share: float) -> NDArray[np.int8]:
    """`extremes` of thickness, slant and size, `[N, 3]`, in the order of `STYLE_WORDS`."""
    return np.stack([extremes(getattr(strokes, name), labels, share) for name in STYLE_WORDS], axis=1)
