"""The offsets that a convolution's tile counts in 32 bits."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from fastsd.kernels.launch.conv2d import OFFSETS, PIXELS, box_of, widest_offset


def largest_offset(
    batch: int, rows: int, columns: int, size: tuple[int, int], inputs: int, outputs: int, kernel: int, stride: int
) -> int:
    """The largest offset that any tile of the kernels uses, as they compute it."""
    (height, width), largest = size, 0
    for pixels in (PIXELS // 2, PIXELS, 2 * PIXELS):
        count = batch * height * width
        for start in range(0, count, pixels):  # by address
            m = torch.arange(start, min(start + pixels, count))
            b, y, x = m // (height * width), m // width % height, m % width
            near = (start // (height * width) * rows + start // width % height * stride) * columns
            corner = (b * rows + y * stride) * columns + x * stride - near
            read = (corner + (kernel - 1) * (columns + 1) + 1) * inputs
            origin = (start // (height * width) * 2 * height + start // width % height * 2) * 2 * width
            written = ((b * 2 * height + 2 * y + 1) * 2 * width + 2 * x + 1 - origin + 1) * outputs
            largest = max(largest, int(read.abs().max()), int(written.abs().max()))
        images, high, wide = box_of(height, width, pixels)  # in boxes
        b, y, x = (min(*n) - 1 for n in ((images, batch), (high, height), (wide, width)))
        largest = max(largest, ((b * 2 * height + 2 * y) * 2 * width + 2 * x + 1) * outputs)
    return largest


def test_no_tile_exceeds_what_is_stated() -> None:
    draw = random.Random(0)
    for _ in range(300):
        kernel, stride, pad = draw.choice([1, 3, 5]), draw.choice([1, 2]), draw.choice([0, 1])
        rows, columns = (draw.choice([draw.randint(kernel, 40), kernel]) for _ in range(2))
        size = (rows + 2 * pad - kernel) // stride + 1, (columns + 2 * pad - kernel) // stride + 1
        sizes = draw.randint(1, 9), rows, columns, size, draw.randint(1, 64), draw.randint(1, 64)
        assert largest_offset(*sizes, kernel, stride) <= widest_offset(*sizes, (kernel, kernel), stride), sizes


SAME = (1, 1, 1, 1)


def refusal(x: tuple[int, ...], outputs: int, kernel: int, stride: int, padding: Any) -> str | None:
    pytest.importorskip("triton", reason="no Triton for this platform")
    from fastsd.kernels.triton import conv2d

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float16, device="meta")

    weight = empty(outputs, kernel, kernel, x[3]).permute(0, 3, 1, 2)
    return conv2d.refusal(empty(*x), weight, None, stride, padding)


@pytest.mark.parametrize(
    ("x", "outputs", "kernel", "stride", "padding"),
    [
        ((512, 1024, 1024, 64), 64, 1024, 1024, (0, 0, 0, 0)),  # a pixel for each image: a tile reads 256 images
        ((1, 3, 2**24, 64), 64, 3, 1, SAME),  # rows of 2^30 elements, two of them in a tile
        ((256, 1, 2**18, 64), 64, 1, 1, (0, 0, 0, 0)),  # a box of 128 images
        ((1, 4, 4, 2**20), 64, 3, 1, SAME),  # a tile of weights
    ],
)
def test_tiles_that_span_more_than_32_bits_are_refused(
    x: tuple[int, ...], outputs: int, kernel: int, stride: int, padding: Any
) -> None:
    assert "may span fewer than 2^31 elements" in str(refusal(x, outputs, kernel, stride, padding))


@pytest.mark.parametrize("x", [(1, 4096, 4096, 256), (16, 1024, 1024, 512), (64, 128, 128, 2560), (2, 8, 8, 2560)])
def test_maps_of_more_elements_are_taken(x: tuple[int, ...]) -> None:
    """The decoder's, of large images and batches: tiles are small parts of them."""
    assert refusal(x, 256, 3, 1, SAME) is None
    assert x[0] < 3 or x[0] * x[1] * x[2] * x[3] > OFFSETS
