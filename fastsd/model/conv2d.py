"""The layer of a convolution, in the dtype of the network or in fp8."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastsd.kernels import dispatch
from fastsd.kernels.conv2d import Padding, conv2d, wants_packed
from fastsd.kernels.conv2d_fp8 import conv2d_fp8, quantize_maps
from fastsd.kernels.cpu import onednn
from fastsd.kernels.linear_fp8 import FP8
from fastsd.kernels.upsample2x import upsample2x, upsample2x_conv
from fastsd.kernels.upsample2x import wants_packed as wants_packed_doubled
from fastsd.model.linear import LayerChange, init_uniform

SAME: Padding = (1, 1, 1, 1)
KNOWN_SHAPES = 64  # of maps that a layer remembers; whoever asks for images of other sizes makes more


class Conv2d(nn.Module):
    """A k x k convolution of `[B, H, W, Cin]` with explicit (left, right, top, bottom) zero padding.

    For inference on the CPU, the first call packs the weight, and the module keeps only the packed form. Operations on
    whole modules (state_dict, load_state_dict, to, train, copies) see or restore the plain weight.

    Attributes:
        scale: the bits of the scales of the weight's output channels, `[Cout]`, after `quantize`; otherwise None.
    """

    scale: torch.Tensor | None
    _packed_for: frozenset[tuple[torch.Size, int]] = frozenset()  # maps that its layout is for: x.shape, thread count
    change: LayerChange | None = None  # as of `Linear`

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: Padding = SAME,
        bias: bool = True,
    ):
        super().__init__()
        self.weight = nn.Parameter(
            torch.empty(out_channels, in_channels, kernel_size, kernel_size, dtype=torch.float32)
        )
        self.bias = nn.Parameter(torch.empty(out_channels, dtype=torch.float32)) if bias else None
        self.register_buffer("scale", None)
        self.stride, self.padding = stride, padding
        init_uniform(self.weight, self.bias)

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, relu: bool = False, add_bias: bool = True
    ) -> torch.Tensor:
        """Without `add_bias`, the caller adds the bias where it costs nothing."""
        weight = self.weight  # a module takes 0.4 µs to find a parameter
        if weight.dtype == torch.uint8:
            y = conv2d_fp8(x, *self.in_fp8(), self.bias if add_bias else None, self.stride, self.padding, residual)
            return y.clamp(min=0) if relu else y
        if (x.shape, torch.get_num_threads()) not in self._packed_for and not (self.training or weight.requires_grad):
            self.pack(x)
            weight = self.weight
        bias = self.bias if add_bias else None
        if self.change is not None:
            y = self.change(x, self._product, bias)
            y = y if residual is None else y + residual
            return y.clamp(min=0) if relu else y
        return conv2d(x, weight, bias, self.stride, self.padding, residual, relu)

    def _product(self, x: torch.Tensor, bias: torch.Tensor | None, added: torch.Tensor | None) -> torch.Tensor:
        return conv2d(x, self.weight, bias, self.stride, self.padding, added)

    def quantize(self) -> None:
        """As `Linear.quantize`, for `forward`; the convolution of a doubled map has no fp8."""
        values, scale = quantize_maps(onednn.dense(self.weight.detach()).permute(0, 2, 3, 1))
        bits = values.view(torch.uint8).permute(0, 3, 1, 2)  # in channels-last memory
        self.weight, self.scale = nn.Parameter(bits, requires_grad=False), scale.view(torch.int32)
        self._packed_for = frozenset()

    def in_fp8(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The weight in e4m3 and the scales of its output channels in fp32, after `quantize`."""
        assert self.scale is not None
        return self.weight.view(FP8), self.scale.view(torch.float32)

    def pack(self, x: torch.Tensor, scale: int = 1) -> None:
        """Bring the weight into the layout that is fastest for `x`, enlarged by `scale`, where oneDNN runs the layer.

        oneDNN's own depends on the map's shape; only packing tells which, and most batches of a size have the same. In
        another one each call would rearrange the weight, which for small maps takes a hundred times as long as the
        convolution. Winograd's reads an ordinary weight, channels last.
        """
        shape = torch.Size((len(x), scale * x.shape[1], scale * x.shape[2], x.shape[3]))
        packing = (shape, torch.get_num_threads())
        if packing in self._packed_for or dispatch.backend(x, self.weight, self.bias) != "onednn":
            return
        if scale == 1:
            packs = wants_packed(shape, self.weight, self.stride, self.padding)
        else:
            packs = wants_packed_doubled(x, self.weight)
        with torch.inference_mode(False), torch.no_grad():
            weight = onednn.dense(self.weight.detach())
            if packs:
                weight = onednn.pack(weight, shape, self.stride, self.padding)
            else:
                weight = weight.contiguous(memory_format=torch.channels_last)
        if onednn.layout(weight) == onednn.layout(self.weight) and len(self._packed_for) < KNOWN_SHAPES:
            self._packed_for |= {packing}
        else:
            self.weight, self._packed_for = nn.Parameter(weight, requires_grad=False), frozenset({packing})

    def after_doubling(self, x: torch.Tensor) -> torch.Tensor:
        """The 3 x 3 convolution of `x` doubled by nearest neighbour."""
        if self.change is not None:
            return self(upsample2x(x))
        if not (self.training or self.weight.requires_grad):
            self.pack(x, 2)
        return upsample2x_conv(x, self.weight, self.bias)

    def unpack(self) -> None:
        """Make the weight an ordinary tensor again."""
        if self.weight.is_mkldnn:
            plain = onednn.dense(self.weight.detach()).contiguous(memory_format=torch.channels_last)
            self.weight = nn.Parameter(plain, self.weight.requires_grad)
        self._packed_for = frozenset()

    def train(self, mode: bool = True) -> Conv2d:
        if mode:
            self.unpack()
        return super().train(mode)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Conv2d:
        self.unpack()
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = onednn.dense(destination[prefix + "weight"])

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unpack()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        weight = nn.Parameter(onednn.dense(self.weight.detach()), self.weight.requires_grad)
        return self.__dict__ | {"_parameters": self._parameters | {"weight": weight}, "_packed_for": frozenset()}
