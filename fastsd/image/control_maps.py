"""The maps that ControlNets and T2I-Adapters read, made of an image by OpenCV: its edges, its colours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from fastsd.errors import FastsdError
from fastsd.image.files import MAX_PIXELS

SQUARE = 64  # pixels of a side, of which `color_grid` makes one colour
GRID_RESOLUTION = 512  # pixels of the shorter side of an image that it reads


def find_edges(image: Image.Image, low: float = 100, high: float = 200) -> Image.Image:
    """An image's edges, white on black, as ControlNets for edges were trained on (Canny 1986; OpenCV's, with L1 norm).

    Args:
        image: RGB.
        low, high: thresholds of the gradient: above `high` is an edge, and above `low` what is connected to one.

    Raises:
        FastsdError: OpenCV is not installed.
    """
    edges = _opencv().Canny(np.asarray(image.convert("RGB")), low, high)
    return Image.fromarray(edges).convert("RGB")


def color_grid(image: Image.Image, resolution: int = GRID_RESOLUTION) -> Image.Image:
    """An image's colours in large squares, as the T2I-Adapter for colours was trained on (Mou et al. 2023).

    The rule is that of `t2ia_color_grid` in A1111's extension: the shorter side becomes `resolution` pixels, by means
    of areas; then each square of 64 pixels gets the colour that bicubic interpolation finds at its middle.

    Args:
        image: RGB.
        resolution: at least 64.

    Returns:
        An image of the same size.

    Raises:
        FastsdError: OpenCV is not installed; an image so long and thin that it would have more than `MAX_PIXELS`.
    """
    cv2 = _opencv()
    scale = resolution / min(image.size)
    width, height = (resolution if side == min(image.size) else round(side * scale) for side in image.size)
    if width * height > MAX_PIXELS:
        raise FastsdError(f"{image.width}x{image.height} pixels: too long and thin for squares of colour")
    pixels = cv2.resize(np.asarray(image.convert("RGB")), (width, height), interpolation=cv2.INTER_AREA)
    grid = cv2.resize(pixels, (width // SQUARE, height // SQUARE), interpolation=cv2.INTER_CUBIC)
    return Image.fromarray(cv2.resize(grid, image.size, interpolation=cv2.INTER_NEAREST))


# By the names that flags (`--control-canny`), lines of batch jobs and metadata have for them.
MAPS: dict[str, Callable[[Image.Image], Image.Image]] = {"canny": find_edges, "color": color_grid}


def _opencv() -> Any:
    try:
        import cv2
    except ImportError:
        raise FastsdError("maps are made by OpenCV, which is missing; pip install 'fastsd[control]'") from None
    return cv2
