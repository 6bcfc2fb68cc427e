"""How far fp8 (docs/fp8.md) is from the same numbers in fp32, without a GPU: images of the bundled models, outputs of
SD1.5's UNet; with products alone in fp8, and with convolutions too.

    python -m bench.fp8_distance             print the table
    python -m bench.fp8_distance --write     also write it to docs/fp8.md

Products and convolutions are those of the specifications, which a GPU computes in another order. SD1.5's weights are
random: the error of its output says how roundings add up in a network of its depth and widths, not what an image looks
like.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastsd.bundled import BUNDLED
from fastsd.config import SD15_UNET, UNetConfig
from fastsd.model.fp8 import layers_in_fp8
from fastsd.model.layers import Conv2d, Linear
from fastsd.model.unet import UNet
from fastsd.pipeline import Pipeline

PAGE = Path(__file__).parent.parent / "docs" / "fp8.md"
BEGIN, END = "<!-- python -m bench.fp8_distance --write -->\n", "<!-- end -->"
PROMPTS = {
    "digits": ("a handwritten eight", "a thick 8", "a thin seven", "a slanted 4"),
    "emoji": ("grinning face", "woman firefighter", "red heart", "cat face"),
}
SEEDS = 4
KINDS: dict[str, tuple[type, ...]] = {"products in fp8": (Linear,), "products and convolutions": (Linear, Conv2d)}


def psnr(found: Any, truth: Any) -> float:
    """Peak signal-to-noise ratio in dB of two images with values to 255."""
    error = float(np.square(np.asarray(found, np.float64) - np.asarray(truth, np.float64)).mean())
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def quantize_kinds(unet: UNet, kinds: tuple[type, ...]) -> tuple[int, float]:
    """Bring the layers in fp8 of these kinds into fp8; their number, and their share of the weights."""
    layers = [layer for layer in layers_in_fp8(unet).values() if isinstance(layer, kinds)]
    weights = sum(layer.weight.numel() for layer in layers)
    for layer in layers:
        layer.quantize()
    return len(layers), weights / sum(x.numel() for x in unet.parameters())


def images(model: str, prompts: tuple[str, ...], seeds: int = SEEDS, **settings: Any) -> dict[str, list[float]]:
    """For each of `KINDS`, the PSNR of each image of a bundled model against that of the same seed in fp32."""
    found = {}
    for name, kinds in {"fp32": (), **KINDS}.items():
        pipe = Pipeline.from_pretrained(str(BUNDLED[model]), device="cpu", dtype="fp32")
        quantize_kinds(pipe.components.unet, kinds)
        found[name] = [pipe(one, seed=seed, **settings).images[0] for one in prompts for seed in range(seeds)]
    truth = found.pop("fp32")
    return {name: [psnr(*pair) for pair in zip(made, truth)] for name, made in found.items()}


@torch.no_grad()
def unet_errors(config: UNetConfig, side: int) -> dict[str, tuple[float, int, float]]:
    """For each of `KINDS`, |fp8 - fp32| / |fp32| of the output for random weights and inputs, the number of layers in
    fp8, and their share of the weights."""
    torch.manual_seed(0)
    unet = UNet(config).eval().requires_grad_(False)
    inputs = torch.randn(2, side, side, 4), torch.tensor([3.0, 801.0]), torch.randn(2, 77, config.cross_attention_dim)
    truth, found = unet(*inputs), {}
    for name, kinds in KINDS.items():
        rounded = copy.deepcopy(unet)
        layers, share = quantize_kinds(rounded, kinds)
        found[name] = float((rounded(*inputs) - truth).norm() / truth.norm()), layers, share
    return found


def table() -> str:
    """The table of docs/fp8.md."""
    lines = [f"| against fp32 | {' | '.join(KINDS)} |", "|---|" + "---|" * len(KINDS)]
    for model, prompts in PROMPTS.items():
        cells = [
            f"PSNR {statistics.median(distances):.1f} dB in the median, {min(distances):.1f} dB in the worst"
            for distances in images(model, prompts).values()
        ]
        lines.append(f"| {model}, {len(prompts) * SEEDS} images of the same seeds | {' | '.join(cells)} |")
    cells = [
        f"relative error of the output {error:.1e}; {layers} layers, {share:.0%} of the weights"
        for error, layers, share in unet_errors(SD15_UNET, 32).values()
    ]
    lines.append(f"| SD1.5's UNet, random weights, 256 × 256 | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


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
