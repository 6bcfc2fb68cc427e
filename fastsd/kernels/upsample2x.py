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
KEPT = 2**18  # elements of a packed weight whose summed kernels are kept: 1.8 MB of fp32 at most
_kept: WeakIdKeyDictionary = WeakIdKeyDictionary()  # packed weight: (shape of x and threads, kernels)


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
    if way == "phases":
        return _upsample2x_conv_onednn(x, weight, bias)
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


def _upsample2x_conv_onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """2 x 2 convolutions of the small map, one for each parity of the result's row and column.

    The kernel's three rows read two rows of the small map: (i - 1, i, i) for even rows of the result, (i, i, i + 1) for
    odd ones. The weights that read the same row are summed, in fp32, which leaves 4 products of 9. With one pixel of
    padding a 2 x 2 convolution has a row and a column more than the map: odd results begin one further.
    """
    batch, height, width, _ = x.shape
    channels = len(weight)
    chw = x.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    kernels = _kernels(x, weight)
    if len(kernels) == 1:  # one convolution of all phases, which lie side by side as channels
        repeated = None if bias is None else torch.cat([bias] * 4)
        y = onednn.convolve(chw, kernels[0], repeated, 1, (1, 1), None).permute(0, 2, 3, 1)
        column = 4 * channels
        row = (width + 1) * column
        # Phase (p, q) begins p rows and q columns further, at channel 2 p + q.
        strides = ((height + 1) * row, row, row + 2 * channels, column, column + channels, 1)
        phases = y.as_strided((batch, height, 2, width, 2, channels), strides)
        return phases.reshape(batch, 2 * height, 2 * width, channels)
    out = x.new_empty(batch, 2 * height, 2 * width, channels)
    for phase, kernel in enumerate(kernels):
        part = onednn.convolve(chw, kernel, bias, 1, (1, 1), None).permute(0, 2, 3, 1)
        p, q = divmod(phase, 2)
        out[:, p::2, q::2] = part[:, p : p + height, q : q + width]
    return out


def _kernels(x: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
    """The summed kernels of the four phases: `[4 Cout, Cin, 2, 2]` or, to need less memory, four tensors of a quarter.

    Summing them costs as much as convolving a small map. Of a small packed weight they are kept, as long as it lives
    and for one shape of `x`; a packed weight never changes (`onednn`).
    """
    kept = weight.is_mkldnn and weight.numel() <= KEPT
    situation = (x.shape, torch.get_num_threads())
    found = _kept.get(weight) if kept else None
    if found is not None and found[0] == situation:
        return [found[1]]
    rows = _merged_taps(onednn.dense(weight.detach()).float(), 2)
    phases = [kernel.to(x.dtype) for row in rows for kernel in _merged_taps(row, 3)]
    if not kept:
        return [kernel.contiguous(memory_format=torch.channels_last) for kernel in phases]
    with torch.inference_mode(False), torch.no_grad():
        packed = onednn.pack(torch.cat(phases).clone(), x.shape, 1, SAME)
    _kept[weight] = (situation, packed)
    return [packed]


def _merged_taps(taps: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The two-tap kernels of even and of odd results along `dim`, from three taps."""
    first, middle, last = taps.unbind(dim)
    return torch.stack([first, middle + last], dim), torch.stack([first + middle, last], dim)
