"""Masks: which pixels are painted anew, and which latent pixels are free in which step.

White is painted in full, black is kept bit for bit, grey is a blend by its value. Nothing is cut at a threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from fastsd.generate.canvas import Box, cut
from fastsd.sampling.table import Table

Weights = NDArray[np.uint8]


@dataclass(frozen=True)
class InpaintMask:
    """The part of an image that changes.

    Attributes:
        original: RGB, the whole image, whose pixels come back where the mask is black.
        weights: "L", of the original's size: 255 is painted, 0 kept, between them a blend.
        box: the part of the original that is painted.
        pixels: `[1, H, W, 1]` fp32 in [0, 1], the weights of the box at the size at which it is painted.
        latents: `[1, h, w, 1]`, the largest weight under each latent pixel.
    """

    original: Image.Image
    weights: Image.Image
    box: Box
    pixels: torch.Tensor
    latents: torch.Tensor

    @classmethod
    def make(
        cls, original: Image.Image, weights: Image.Image, box: Box, size: tuple[int, int], downscale: int
    ) -> InpaintMask:
        """size: width and height at which the box is painted; downscale: pixels under a latent pixel."""
        inside = scale_mask(np.asarray(cut(weights, box)), size)
        pixels = torch.from_numpy(inside.astype(np.float32) / 255.0)[None, None]
        latents = torch.nn.functional.max_pool2d(pixels, downscale)
        return cls(original, weights, box, *(x.permute(0, 2, 3, 1).contiguous() for x in (pixels, latents)))

    @property
    def hidden(self) -> torch.Tensor:
        """`[1, h, w, 1]`: 1 where a UNet for inpainting does not see the image, since some pixel there changes."""
        return (self.latents > 0).float()

    @property
    def is_grey(self) -> bool:
        """Some latent pixel is neither kept nor free throughout."""
        return bool(((self.latents > 0) & (self.latents < 1)).any())

    def compose_float(self, painted: NDArray[np.float32]) -> NDArray[np.float32]:
        """The original with the painted box in it, `[H, W, 3]`, in floating-point numbers from 0 to 255.

        painted: `[h, w, 3]`, likewise. Where the mask is black the numbers are the original's, exactly.
        """
        left, top, right, bottom = self.box
        resized = resize_float(painted, (right - left, bottom - top))
        result = np.array(self.original, dtype=np.float32)
        height, width = result.shape[:2]
        x, y = slice(max(left, 0), min(right, width)), slice(max(top, 0), min(bottom, height))
        part = resized[y.start - top : y.stop - top, x.start - left : x.stop - left]
        share = np.asarray(self.weights, dtype=np.float32)[y, x, None] / np.float32(255.0)
        kept = result[y, x]
        blend = kept + share * (part - kept)
        result[y, x] = np.where(share == 0, kept, np.where(share == 1, part, blend))
        return result


def free_latents(latents: torch.Tensor, table: Table, row: int) -> torch.Tensor:
    """1 where a latent pixel is not restored to the image after a row of the table.

    Differential diffusion (Levin and Fried 2023, algorithm 1): a pixel of value v is kept at the image's noise level
    until the share 1 - v of the steps is done, then it is free. White is free throughout; black never.

    Args:
        latents: `[1, h, w, 1]`, the mask in [0, 1]. The result has its shape.
    """
    if row + 1 >= len(table):
        return (latents > 0).float()
    done = float(table.step[row + 1] - table.step[0]) / table.steps
    return ((latents > 0) & (1.0 - latents <= done)).float()


def resize_float(pixels: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """`[h, w, 3]` at another (width, height) by Lanczos, each channel as floating-point numbers."""
    if pixels.shape[1::-1] == size:
        return pixels
    channels = [
        Image.fromarray(np.ascontiguousarray(channel)).resize(size, Image.Resampling.LANCZOS)
        for channel in pixels.transpose(2, 0, 1)
    ]
    return np.stack([np.asarray(channel) for channel in channels], axis=-1).clip(0.0, 255.0)


def scale_mask(mask: Weights, size: tuple[int, int]) -> Weights:
    """A mask `[h, w]` at another (width, height): each pixel is the largest of those that it covers, even in part.

    So no stroke is lost, however thin, and every white pixel stays white.
    """
    for axis, length in ((1, size[0]), (0, size[1])):
        old = mask.shape[axis]
        if old == length:
            continue
        starts = np.arange(length) * old // length
        ends = -(-(np.arange(length) + 1) * old // length)
        result = np.take(mask, starts, axis)
        for k in range(1, int((ends - starts).max())):
            result = np.maximum(result, np.take(mask, np.minimum(starts + k, ends - 1), axis))
        mask = result
    return mask


def blur_mask(mask: Weights, sigma: float) -> Weights:
    """A Gaussian blur of standard deviation `sigma` pixels, cut at 2.5 of them, as A1111's "Mask blur".

    A1111 (`StableDiffusionProcessingImg2Img.init` in modules/processing.py) calls OpenCV with a kernel of
    2 int(2.5 sigma + 0.5) + 1 pixels. Beyond the image its border goes on.
    """
    reach = int(2.5 * sigma + 0.5)
    if reach < 1:
        return mask
    at = np.arange(-reach, reach + 1)
    kernel = np.exp(-(at**2) / (2.0 * sigma**2))
    kernel /= kernel.sum()
    values = mask.astype(np.float64)
    for axis in (0, 1):
        padding = [(reach, reach) if i == axis else (0, 0) for i in range(2)]
        padded, length = np.pad(values, padding, mode="edge"), values.shape[axis]
        values = sum(weight * np.take(padded, np.arange(k, k + length), axis) for k, weight in enumerate(kernel))
    return values.round().clip(0, 255).astype(np.uint8)


def mask_notes(before: Weights, after: Weights, blur: float, why: Sequence[str]) -> list[str]:
    """What a user should know of a mask: that it paints nothing, or that its blur takes thin strokes away.

    Args:
        before, after: the mask without and with its blur.
        why: what was done to it, for the first of these notes.
    """
    if not after.any():
        return [f"the mask is black all over{', '.join(['', *why])}, so nothing changes; white is what changes"]
    # A wide area keeps half at its edges and a quarter, 64, at its corners.
    if bool(((before == 255) & (after < 60)).any()):
        return [f"a mask blur of {blur:g} leaves less than a quarter of thin strokes; a smaller one leaves more"]
    return []
