"""Which layers of a UNet compute in fp8."""

from __future__ import annotations

from fastsd.kernels.launch.linear import UNIT_FP8
from fastsd.model.layers import Linear
from fastsd.model.unet import UNet

SMALLEST = 64  # columns of an activation whose quantisation costs less than its product saves


def layers_in_fp8(unet: UNet) -> dict[str, Linear]:
    """The products of the step with many columns: those of the transformers, and the shortcuts of wide maps.

    The others stay in the dtype of the UNet: the time embedding and the text's keys and values, which are computed once
    for all steps, and the convolutions, of which one pixel is read under nine positions of the kernel, so that they
    would need one scale for a whole map.
    """
    return {
        name: module
        for name, module in unet.named_modules()
        if isinstance(module, Linear)
        and (".attentions." in f".{name}" or name.endswith("conv_shortcut"))
        and not name.endswith("to_kv")
        and module.weight.shape[1] >= SMALLEST
        and module.weight.shape[1] % UNIT_FP8 == 0
    }


def quantize_unet(unet: UNet) -> None:
    """Bring the weights of `layers_in_fp8` into fp8, one layer after the other."""
    for layer in layers_in_fp8(unet).values():
        layer.quantize()
