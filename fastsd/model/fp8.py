"""Which layers of a UNet compute in fp8."""

from __future__ import annotations

from fastsd.kernels.launch.linear import UNIT_FP8
from fastsd.model.layers import Conv2d, Linear
from fastsd.model.unet import UNet

SMALLEST = 64  # columns or channels of an activation whose quantisation costs less than its product saves


def layers_in_fp8(unet: UNet) -> dict[str, Linear | Conv2d]:
    """The wide products and convolutions of the step: those of the transformers, of the residual blocks and their
    shortcuts, and the ones that halve a map.

    The others stay in the dtype of the UNet: the time embedding and the text's keys and values, which are computed once
    for all steps; the first and the last convolution, which have four channels on one side; and those of doubled maps,
    which in 16 bits take four products of nine (`upsample2x_conv`), the time of eight in fp8.
    """
    return {name: module for name, module in unet.named_modules() if _takes(f".{name}", module)}


def _takes(name: str, module: object) -> bool:
    if isinstance(module, Linear):
        chosen = (".attentions." in name or name.endswith("conv_shortcut")) and not name.endswith("to_kv")
    elif isinstance(module, Conv2d):
        chosen = (".resnets." in name or ".downsamplers." in name) and len(module.weight) >= SMALLEST
    else:
        return False
    inputs = module.weight.shape[1]
    return chosen and inputs >= SMALLEST and inputs % UNIT_FP8 == 0


def quantize_unet(unet: UNet) -> None:
    """Bring the weights of `layers_in_fp8` into fp8, one layer after the other."""
    for layer in layers_in_fp8(unet).values():
        layer.quantize()
