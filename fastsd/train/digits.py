"""MNIST (LeCun, Cortes, Burges 1998) as training images: read, enlarged to 64 x 64, scaled and sheared at random."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from fastsd.errors import FastsdError
from fastsd.train.packed import read_idx

MNIST_SIDE = 28  # pixels
IMAGE_SIDE = 64  # pixels of a training image
MARGIN = 2.0  # pixels that stay black at every edge


@dataclass(frozen=True)
class Digits:
    """`images` `[N, 28, 28]` uint8, white on black, and `labels` `[N]` uint8."""

    images: NDArray[np.uint8]
    labels: NDArray[np.uint8]


def read_digits(folder: str | Path, split: str = "train") -> Digits:
    """Read MNIST's IDX files.

    Args:
        folder: contains `train-images-idx3-ubyte.gz` and the three other files.
        split: "train" (60,000) or "t10k" (10,000).

    Raises:
        FastsdError: a file is missing or damaged.
    """
    images = read_idx(Path(folder) / f"{split}-images-idx3-ubyte.gz", 3)
    labels = read_idx(Path(folder) / f"{split}-labels-idx1-ubyte.gz", 1)
    if len(images) != len(labels):
        raise FastsdError(f"{len(images)} images but {len(labels)} labels in the {split} files", path=folder)
    return Digits(images, labels)


def enlarge(
    images: NDArray[np.uint8], scale: NDArray[np.float64] | float = 1.0, shear: NDArray[np.float64] | float = 0.0
) -> torch.Tensor:
    """Enlarge MNIST images to 64 x 64 by bicubic interpolation, then sharpen the edges.

    The centre of mass stays at the centre, where MNIST puts it. A scale that would bring a stroke nearer than `MARGIN`
    to an edge is reduced until it fits.

    Args:
        images: `[N, 28, 28]` uint8.
        scale: 1 is the nominal size, at which 28 pixels become 64.
        shear: pixels to the right per pixel upwards.

    Returns:
        `[N, 64, 64]` float32 in [0, 1].
    """
    count = len(images)
    scale = np.broadcast_to(np.asarray(scale, dtype=np.float64), (count,))
    shear = np.broadcast_to(np.asarray(shear, dtype=np.float64), (count,))
    zoom = np.minimum(scale, _largest_scale(images, shear))
    # grid_sample takes the source position of each output pixel; both range over [-1, 1] from edge to edge.
    inverse = torch.zeros(count, 2, 3, dtype=torch.float32, device="cpu")
    inverse[:, 0, 0] = inverse[:, 1, 1] = torch.from_numpy(1 / zoom)
    inverse[:, 0, 1] = torch.from_numpy(shear / zoom)
    grid = F.affine_grid(inverse, [count, 1, IMAGE_SIDE, IMAGE_SIDE], align_corners=False)
    source = torch.from_numpy(images.astype(np.float32) / 255)[:, None]
    smooth = F.grid_sample(source, grid, mode="bicubic", padding_mode="zeros", align_corners=False)[:, 0]
    # Bicubic edges are 2 to 3 pixels wide; contrast around 0.4 sharpens them and keeps faint strokes visible.
    return ((smooth - 0.4) * 1.6 + 0.4).clamp(0, 1)


def augment(
    images: NDArray[np.uint8], generator: np.random.Generator, scales: tuple[float, float], shear: float
) -> torch.Tensor:
    """`enlarge` each image with a random scale, uniform in `scales`, and a random shear, uniform in [-shear, shear]."""
    scale = generator.uniform(*scales, size=len(images))
    return enlarge(images, scale, generator.uniform(-shear, shear, size=len(images)))


def to_rgb(images: torch.Tensor) -> torch.Tensor:
    """`[N, H, W]` in [0, 1] to the input of the autoencoder, `[N, H, W, 3]` in [-1, 1]."""
    return (images * 2 - 1)[..., None].expand(*images.shape, 3)


def _largest_scale(images: NDArray[np.uint8], shear: NDArray[np.float64]) -> NDArray[np.float64]:
    """The scale at which the sheared ink reaches the margin on one side."""
    offset = np.abs(np.arange(MNIST_SIDE) + 0.5 - MNIST_SIDE / 2) + 0.5
    ink = images > 32
    reach_y = (ink.any(2) * offset).max(1)
    reach_x = (ink.any(1) * offset).max(1) + np.abs(shear) * reach_y
    reach = np.maximum(np.maximum(reach_x, reach_y), 1.0) * IMAGE_SIDE / MNIST_SIDE
    return (IMAGE_SIDE / 2 - MARGIN) / reach


def outlined(images: torch.Tensor) -> torch.Tensor:
    """`[N, H, W]` in [0, 1]: the two pixels around each stroke instead of the stroke."""
    return (F.max_pool2d(images[:, None], 5, stride=1, padding=2)[:, 0] - images).clamp(0, 1)


# What becomes of the digits after their augmentation, by the name in a config.
STYLES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "": lambda images: images,
    "outlined": outlined,
    "mirrored": lambda images: images.flip(-1),
}
