"""A small convolutional network that reads handwritten digits, to judge generated ones.

It is trained on MNIST's real training set only. Images of 64x64 and MNIST's own 28x28 are both resampled to 32x32. Its
training covers the range of sizes that the digits model generates, so it reads small and large digits equally well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from fastsd.errors import FastsdError

SIDE = 32
SCALES = (0.65, 1.2)  # a little wider than `settings.DigitsData.scales`, which the digits model is trained on
EPOCHS = 5
BATCH = 128
FACTORY: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}


class DigitReader(nn.Module):
    """Three convolutions and a linear layer: `[N, 1, 32, 32]` in [0, 1] to logits `[N, 10]`."""

    def __init__(self, widths: tuple[int, int, int] = (24, 48, 96)):
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(i, o, 3, padding=1, bias=False, **FACTORY) for i, o in zip((1, *widths), widths)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(width, **FACTORY) for width in widths)
        self.out = nn.Linear(widths[-1] * (SIDE // 8) ** 2, 10, **FACTORY)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """`[N, 1, 32, 32]` to what the last layer reads, `[N, 16 * widths[-1]]`."""
        for conv, norm in zip(self.convs, self.norms):
            x = F.max_pool2d(F.relu(norm(conv(x))), 2)
        return x.flatten(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(F.dropout(self.features(x), 0.3, self.training))


def to_input(images: torch.Tensor) -> torch.Tensor:
    """Resample white-on-black images to the input size of the reader.

    Args:
        images: `[N, H, W]` in [0, 1], square, framed as in MNIST (a digit of 20 pixels in a frame of 28).

    Returns:
        `[N, 1, 32, 32]` in [0, 1], by area averages if the side is a multiple of 32, else by interpolation.
    """
    side = images.shape[-1]
    if side % SIDE == 0:
        return F.avg_pool2d(images[:, None], side // SIDE)
    return F.interpolate(images[:, None], size=(SIDE, SIDE), mode="bilinear", antialias=side > SIDE)


@torch.inference_mode()
def read(reader: DigitReader, images: torch.Tensor) -> torch.Tensor:
    """The digits that `reader` recognises in `images` `[N, H, W]` in [0, 1], as `[N]` int64."""
    reader.eval()
    return torch.cat([reader(to_input(part)).argmax(dim=1) for part in images.split(500)])


def train_reader(
    images: np.ndarray,
    labels: np.ndarray,
    epochs: int = EPOCHS,
    seed: int = 0,
    report: Callable[[str], None] | None = None,
) -> DigitReader:
    """Train a reader: AdamW, one cycle of the learning rate, label smoothing of 0.05.

    Args:
        images: `[N, 28, 28]` uint8.
        labels: `[N]`, 0 to 9.
        report: receives a line for every epoch.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # for the initial weights and dropout
        torch.manual_seed(seed)
        reader = DigitReader().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = torch.optim.AdamW(reader.parameters(), weight_decay=0.02)
        x, y = torch.from_numpy(images.copy()), torch.from_numpy(labels.astype(np.int64))
        steps = epochs * math.ceil(len(x) / BATCH)
        step = 0
        for epoch in range(epochs):
            reader.train()
            correct = 0
            for index in torch.randperm(len(x), generator=generator, dtype=torch.int64, device="cpu").split(BATCH):
                progress = step / steps
                for group in optimizer.param_groups:
                    group["lr"] = 4e-3 * min(progress / 0.2, (1 - progress) / 0.8)
                logits = reader(_augment(x[index].float() / 255, generator))
                optimizer.zero_grad(set_to_none=True)
                F.cross_entropy(logits, y[index], label_smoothing=0.05).backward()
                optimizer.step()
                correct += int((logits.argmax(dim=1) == y[index]).sum())
                step += 1
            if report is not None:
                report(
                    f"reader: epoch {epoch + 1} of {epochs}, {correct / len(x):.2%} of augmented training images read"
                )
    return reader.eval()


def _augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """`[N, 28, 28]` in [0, 1] to `[N, 1, 32, 32]`, with random size, rotation, shear, shift and contrast."""
    n = len(images)

    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.empty(n, dtype=torch.float32, device="cpu").uniform_(low, high, generator=generator)

    scale, angle, shear = uniform(*SCALES), uniform(-0.12, 0.12), uniform(-0.15, 0.15)
    matrix = torch.empty(n, 2, 3, dtype=torch.float32, device="cpu")
    matrix[:, 0, 0], matrix[:, 0, 1] = angle.cos() / scale, (shear - angle.sin()) / scale
    matrix[:, 1, 0], matrix[:, 1, 1] = angle.sin() / scale, angle.cos() / scale
    matrix[:, :, 2] = torch.stack([uniform(-0.08, 0.08), uniform(-0.08, 0.08)], dim=1)
    grid = F.affine_grid(matrix, [n, 1, SIDE, SIDE], align_corners=False)
    resampled = F.grid_sample(images[:, None], grid, mode="bilinear", align_corners=False)
    contrast = uniform(0.9, 1.8)[:, None, None, None]  # generated digits have sharper edges than MNIST's
    return ((resampled - 0.5) * contrast + 0.5).clamp(0, 1)


def save_reader(reader: DigitReader, path: Path) -> None:
    """Write the weights in fp16; the rounding of 2^-11 is far below the variation between trainings."""
    weights = {k: v.half().contiguous() if v.is_floating_point() else v for k, v in reader.state_dict().items()}
    save_file({k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")}, path)


def load_reader(path: Path) -> DigitReader:
    """Read weights that `save_reader` wrote.

    Raises:
        FastsdError: the file cannot be read, or contains something else.
    """
    reader = DigitReader()
    expected = {k: v for k, v in reader.state_dict().items() if not k.endswith("num_batches_tracked")}
    try:
        weights = load_file(path)
    except Exception as error:  # safetensors' own exception has no public base class; OSError for the file
        raise FastsdError(f"cannot be read ({error})", path=path) from error
    if {k: v.shape for k, v in weights.items()} != {k: v.shape for k, v in expected.items()}:
        raise FastsdError("not the weights of a digit reader", path=path)
    counters = {k: v for k, v in reader.state_dict().items() if k not in expected}
    reader.load_state_dict({k: v.float() for k, v in weights.items()} | counters)
    return reader.eval()
