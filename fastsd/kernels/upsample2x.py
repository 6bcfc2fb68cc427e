"""Nearest-neighbour upsampling by two, and the 3 x 3 convolution that follows it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastsd.kernels import dispatch
from fastsd.kernels.conv2d import Padding, conv2d, conv2d_ref
from fastsd.kernels.cpu import choices, onednn

SAME: Padding = (1, 1, 1, 1)


def upsample2x_ref(x: torch.Tensor) -> torch.Tensor:
    """The specification of `upsample2x`: every pixel becomes a 2 x 2 square of itself."""
    return x.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)


def upsample2x(x: torch.Tensor) -> torch.Tensor:
    """`[B, H, W, C]` to `[B, 2H, 2W, C]`, nearest neighbour."""
    if dispatch.backend(x) == "reference":
        return upsample2x_ref(x)
    return F.interpolate(x.permute(0, 3, 1, 2), scale_factor=2.0, mode="nearest").permute(0, 2, 3, 1)


def upsample2x_conv_ref(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The specification of `upsample2x_conv`."""
    return conv2d_ref(upsample2x_ref(x), weight, bias, 1, SAME)


def upsample2x_conv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`conv2d(upsample2x(x))` with a 3 x 3 kernel and one pixel of padding.

    Args:
        x: `[B, H, W, Cin]`.
        weight: `[Cout, Cin, 3, 3]`, dense or packed; bias: `[Cout]` or None.

    Returns:
        `[B, 2H, 2W, Cout]` in the dtype of `x`.
    """
    backend = dispatch.backend(x, weight, bias)
    if backend == "reference":
        return upsample2x_conv_ref(x, weight, bias)
    if backend == "onednn" and choices.way("upsample2x_conv", x.dtype, x.shape[1] * x.shape[2]) == "phases":
        return _upsample2x_conv_onednn(x, weight, bias)
    return conv2d(upsample2x(x), weight, bias, 1, SAME)


def _upsample2x_conv_onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Four 2 x 2 convolutions of the small map, one for each parity of the result's row and column.

    The kernel's three rows read two rows of the small map: (i - 1, i, i) for even rows of the result, (i, i, i + 1) for
    odd ones. The weights that read the same row are summed, in fp32, which leaves 4 products of 9.
    """
    batch, height, width, _ = x.shape
    padded = F.pad(x.permute(0, 3, 1, 2), SAME).contiguous(memory_format=torch.channels_last)
    taps = onednn.dense(weight).float()
    out = x.new_empty(batch, 2 * height, 2 * width, len(weight))
    for row, by_row in enumerate(_merged_taps(taps, 2)):
        for column, kernel in enumerate(_merged_taps(by_row, 3)):
            part = padded[:, :, row : row + height + 1, column : column + width + 1]
            part = part.contiguous(memory_format=torch.channels_last)
            kernel = kernel.to(x.dtype).contiguous(memory_format=torch.channels_last)
            y = onednn.convolve(part, kernel, bias, 1, (0, 0), None)
            out[:, row::2, column::2] = y.permute(0, 2, 3, 1)
    return out


def _merged_taps(taps: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The two-tap kernels of even and of odd results along `dim`, from three taps."""
    first, middle, last = taps.unbind(dim)
    return torch.stack([first, middle + last], dim), torch.stack([first + middle, last], dim)
