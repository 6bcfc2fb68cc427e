"""How far fp8 (docs/fp8.md) is from the same numbers in fp32, without a GPU: images of digits, outputs of SD1.5's UNet.

    python -m bench.fp8_distance             print the table
    python -m bench.fp8_distance --write     also write it to docs/fp8.md

The products are those of the specification, which a GPU computes in another order. SD1.5's weights are random: the
error of its output says how roundings add up in a network of its depth and widths, not what an image looks like.
"""

from __future__ import annotations

import argparse
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastsd.config import SD15_UNET, UNetConfig
from fastsd.model.fp8 import layers_in_fp8, quantize_unet
from fastsd.model.unet import UNet
from fastsd.pipeline import Pipeline

PAGE = Path(__file__).parent.parent / "docs" / "fp8.md"
BEGIN, END = "<!-- python -m bench.fp8_distance --write -->\n", "<!-- end -->"
PROMPTS = ("a handwritten eight", "a thick 8", "a thin seven", "a slanted 4")
SEEDS = 4


def psnr(found: Any, truth: Any) -> float:
    """Peak signal-to-noise ratio in dB of two images with values to 255."""
    error = float(np.square(np.asarray(found, np.float64) - np.asarray(truth, np.float64)).mean())
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def digits(prompts: tuple[str, ...] = PROMPTS, seeds: int = SEEDS, **settings: Any) -> list[float]:
    """The PSNR of each image in fp8 against that of the same seed in fp32."""
    wide, fp8 = (Pipeline.from_pretrained(device="cpu", dtype="fp32") for _ in range(2))
    quantize_unet(fp8.components.unet)
    return [
        psnr(*(pipe(prompt, seed=seed, **settings).images[0] for pipe in (fp8, wide)))
        for prompt in prompts
        for seed in range(seeds)
    ]


@torch.no_grad()
def unet_error(config: UNetConfig, side: int) -> tuple[float, int, float]:
    """|fp8 - fp32| / |fp32| of the output for random weights and inputs, the number of layers in fp8, and their share
    of the parameters."""
    torch.manual_seed(0)
    unet = UNet(config).eval().requires_grad_(False)
    inputs = torch.randn(2, side, side, 4), torch.tensor([3.0, 801.0]), torch.randn(2, 77, config.cross_attention_dim)
    truth, layers = unet(*inputs), layers_in_fp8(unet)
    share = sum(layer.weight.numel() for layer in layers.values()) / sum(x.numel() for x in unet.parameters())
    quantize_unet(unet)
    return float((unet(*inputs) - truth).norm() / truth.norm()), len(layers), share


def table() -> str:
    """The table of docs/fp8.md."""
    distances = digits()
    error, layers, share = unet_error(SD15_UNET, 32)
    return (
        "| | fp8 against fp32 |\n|---|---|\n"
        f"| digits, {len(distances)} images of the same seeds | PSNR {statistics.median(distances):.1f} dB in the "
        f"median, {min(distances):.1f} dB in the worst |\n"
        f"| SD1.5's UNet, random weights, 256 × 256: {layers} layers, {share:.0%} of the weights | relative error of "
        f"the output {error:.1e} |\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    arguments = parser.parse_args()
    rows = table()
    print(rows, end="")
    if arguments.write:
        text = PAGE.read_text(encoding="utf-8")
        start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
        PAGE.write_text(text[:start] + rows + text[end:], encoding="utf-8")


if __name__ == "__main__":
    main()
