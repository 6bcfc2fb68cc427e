"""The canvas of inpainting: boxes of an image, an enlarged image, and what a painted part starts from."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Box = tuple[int, int, int, int]  # left, top, right, bottom; it may reach beyond the image


def cut(image: Image.Image, box: Box) -> Image.Image:
    """A box of an image. Beyond the image an "L" mask is black, and colours go on as at the border."""
    left, top, right, bottom = box
    if left >= 0 and top >= 0 and right <= image.width and bottom <= image.height:
        return image.crop(box)
    if image.mode == "L":
        return image.crop(box)  # Pillow fills with 0
    x = np.arange(left, right).clip(0, image.width - 1)
    y = np.arange(top, bottom).clip(0, image.height - 1)
    return Image.fromarray(np.asarray(image)[y[:, None], x])


def surroundings(weights: NDArray[np.uint8], padding: int, size: tuple[int, int]) -> Box:
    """The box of a mask `[H, W]` with its padding, widened to the shape of `size`, (width, height).

    It is moved into the image where it fits, and reaches beyond it evenly where it is larger. A mask that is black all
    over has the whole image. (A1111's `get_crop_region_v2` and `expand_crop_region` in modules/masking.py do the same,
    but cut the box at the image and so distort it.)
    """
    height, width = weights.shape
    columns, rows = (np.flatnonzero(weights.any(axis)) for axis in (0, 1))
    if not len(columns):
        spans = [(0, width), (0, height)]
    else:
        spans = [
            (max(int(at[0]) - padding, 0), min(int(at[-1]) + 1 + padding, side))
            for at, side in ((columns, width), (rows, height))
        ]
    wide, high = (end - start for start, end in spans)
    if wide * size[1] < high * size[0]:
        wide = round(high * size[0] / size[1])
    else:
        high = round(wide * size[1] / size[0])
    (left, right), (top, bottom) = (
        _place(*span, length, side) for span, length, side in zip(spans, (wide, high), (width, height), strict=True)
    )
    return left, top, right, bottom


def _place(start: int, end: int, length: int, side: int) -> tuple[int, int]:
    """A span of `length` around the middle of one, within 0 to `side` where it fits, else evenly beyond both ends."""
    length = max(length, end - start)
    first = (start + end - length) // 2
    first = min(max(first, 0), side - length) if length <= side else (side - length) // 2
    return first, first + length


def enlarge_canvas(
    image: Image.Image, sides: tuple[int, int, int, int], factor: int
) -> tuple[Image.Image, Box, tuple[int, int, int, int]]:
    """The image on a larger canvas whose sides are multiples of `factor`; what is new is filled from its border.

    Args:
        sides: pixels at left, top, right, bottom. What is missing to a multiple goes to the right or the bottom, or to
            the other side where that one alone is enlarged.

    Returns:
        The canvas, the image's box in it, and the sides as they became.
    """
    left, top, right, bottom = sides
    wide, high = -(image.width + left + right) % factor, -(image.height + top + bottom) % factor
    left, right = (left + wide, right) if left and not right else (left, right + wide)
    top, bottom = (top + high, bottom) if top and not bottom else (top, bottom + high)
    box = (left, top, left + image.width, top + image.height)
    around = (-left, -top, image.width + right, image.height + bottom)
    canvas = cut(image, around)
    new = np.full((canvas.height, canvas.width), 255, dtype=np.uint8)
    new[top : top + image.height, left : left + image.width] = 0
    return fill_from_around(canvas, new), box, (left, top, right, bottom)


def fill_from_around(image: Image.Image, mask: NDArray[np.uint8]) -> Image.Image:
    """`image` with the colours around a mask `[H, W]` in its place: smooth, and without what was there.

    Pull-push (Gortler et al. 1996, section 4): averages of the known pixels at half the size, again and again; then,
    from the smallest, each size fills what the next larger does not know. Grey keeps its share of the image.
    """
    values = np.asarray(image, dtype=np.float64)
    known = 1.0 - mask.astype(np.float64)[..., None] / 255.0
    filled = _pull_push(values * known, known)
    return Image.fromarray((values * known + filled * (1.0 - known)).round().clip(0, 255).astype(np.uint8))


def _pull_push(sums: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Colours `[H, W, 3]` everywhere, from weighted ones and their weights `[H, W, 1]` in [0, 1]."""
    height, width = weights.shape[:2]
    own = sums / np.maximum(weights, 1e-12)
    if weights.min() >= 1.0 or max(height, width) == 1:
        return own if weights.max() > 0 else np.full_like(sums, 127.5)
    padding = ((0, height % 2), (0, width % 2), (0, 0))
    halves = [np.pad(x, padding) for x in (sums, weights)]
    halves = [x.reshape(x.shape[0] // 2, 2, x.shape[1] // 2, 2, -1).sum((1, 3)) for x in halves]
    scale = np.minimum(1.0, 1.0 / np.maximum(halves[1], 1e-12))  # a weight counts up to 1
    coarse = _pull_push(halves[0] * scale, halves[1] * scale)
    channels = [
        Image.fromarray(channel.astype(np.float32)).resize((coarse.shape[1] * 2, coarse.shape[0] * 2), BILINEAR)
        for channel in coarse.transpose(2, 0, 1)
    ]
    smooth = np.stack([np.asarray(channel, dtype=np.float64) for channel in channels], -1)[:height, :width]
    return weights * own + (1.0 - weights) * smooth


BILINEAR = Image.Resampling.BILINEAR
