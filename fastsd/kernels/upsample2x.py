"""Nearest-neighbour upsampling by two, and the 3 x 3 convolution that follows it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.weak import WeakIdKeyDictionary

from fastsd.kernels import candidates, dispatch
from fastsd.kernels.candidates import GpuOp, OpCandidate
from fastsd.kernels.conv2d import Padding, conv2d, conv2d_ref
from fastsd.kernels.cpu import choices, onednn, winograd
from fastsd.kernels.launch import architecture, variants
from fastsd.kernels.launch.conv2d import ConvBoxes, ConvPointers, saves_time_doubled

SAME: Padding = (1, 1, 1, 1)
KEPT = 2**18  # elements of a packed weight whose sums are kept: 1.8 MB of fp32 at most
_kept: WeakIdKeyDictionary = WeakIdKeyDictionary()  # packed weight: (shape of the map and threads, sums)


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
    if backend == "triton":
        return candidates.run(OP, x, weight, bias)
    way = _way(x, weight, weight.is_mkldnn) if backend == "onednn" else "doubling"
    if way == "winograd":
        return winograd.convolve_doubled(x, weight, bias)
    if way == "transposed":
        return _by_transposed(x, weight, bias)
    return _by_doubling(x, weight, bias)


def _by_doubling(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return conv2d(upsample2x(x), weight, bias, 1, SAME)


def _by_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    launch: ConvBoxes | ConvPointers | None = None,
) -> torch.Tensor:
    from fastsd.kernels.triton import upsample2x_conv as upsample2x_conv_triton

    return upsample2x_conv_triton.upsample2x_conv(x, weight, bias, launch)


def _launches(
    thorough: bool, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> list[ConvBoxes | ConvPointers]:
    _, height, width, inputs = x.shape
    return variants.convolutions(thorough, architecture.class_of(x.device), height, width, inputs, len(weight), 4, 1, 4)


def _no_triton(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> str | None:
    from fastsd.kernels.triton import conv2d as conv2d_triton

    return conv2d_triton.refusal(x, weight, bias, 1, SAME)


def _first(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> str | None:
    ours = saves_time_doubled(4 * x.shape[1] * x.shape[2], weight.shape[1], weight.shape[0])
    return "triton" if x.element_size() == 2 and ours else None


def _by_torch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    doubled = F.interpolate(x.permute(0, 3, 1, 2), scale_factor=2.0, mode="nearest")
    return F.conv2d(doubled, onednn.dense(weight), bias, padding=1).permute(0, 2, 3, 1)


OP = GpuOp(
    "upsample2x_conv",
    upsample2x_conv_ref,
    (
        OpCandidate("doubling", _by_doubling),  # the convolution by its own choice
        OpCandidate(
            "triton",
            _by_triton,
            _no_triton,
            partial=True,
            launches=_launches,
            launch_types=(ConvBoxes, ConvPointers),
        ),
        OpCandidate("torch", _by_torch),
    ),
    first=_first,
)


def wants_packed(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `upsample2x_conv` on oneDNN is faster with a packed weight (for the doubled map)."""
    return weight.numel() <= KEPT or _way(x, weight, False) == "doubling"


def _way(x: torch.Tensor, weight: torch.Tensor, packed: bool) -> str:
    kind = ""
    if weight.numel() <= KEPT:
        kind = ", kept weights" if packed else ""
    elif winograd.takes(weight, 1) and not packed:
        kind = ", Winograd's"
    return choices.way("upsample2x_conv" + kind, x.dtype, x.shape[1] * x.shape[2])


def _by_transposed(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """A transposed convolution of each small map, which has 4 products for a result instead of 9.

    One of several maps, on more than one thread, would give each of them other sums than it has alone.
    """
    chw = x.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    summed = _transposed(x, weight)
    maps = [onednn.convolve_transposed(image, summed, bias).permute(0, 2, 3, 1) for image in chw.split(1)]
    return maps[0] if len(maps) == 1 else torch.cat(maps)


def _transposed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The weight of the transposed convolution, `[Cin, Cout, 4, 4]`.

    Summing it costs as much as convolving a small map. That of a small packed weight is kept, as long as it lives
    and for one size of map; a packed weight never changes (`onednn`).
    """
    kept = weight.is_mkldnn and weight.numel() <= KEPT
    situation = (x.shape[1:], torch.get_num_threads())
    found = _kept.get(weight) if kept else None
    if found is not None and found[0] == situation:
        return found[1]
    taps = _summed_taps(_summed_taps(onednn.dense(weight.detach()).float(), 2), 3)
    summed = taps.to(x.dtype).transpose(0, 1).contiguous(memory_format=torch.channels_last)
    if not kept:
        return summed
    with torch.inference_mode(False), torch.no_grad():
        packed = onednn.pack_transposed(summed.clone(), x.shape[1:])
    _kept[weight] = (situation, packed)
    return packed


def _summed_taps(taps: torch.Tensor, dim: int) -> torch.Tensor:
    """The four taps of the transposed convolution along `dim`, in fp32.

    Tap a of the three reads, for row j of the result, row j + a - 1 of the doubled map: pixel i for j = 2i - a + 1 and
    one more. Pixel i so adds to row 2i - 1 by the last tap, to 2i by the last two, to 2i + 1 by the first two and to
    2i + 2 by the first.
    """
    first, middle, last = taps.unbind(dim)
    return torch.stack([last, middle + last, first + middle, first], dim)
