"""Weights for the Inception network that are the same everywhere, without its 91 MiB file."""

from __future__ import annotations

import math

import torch

from fastsd.evaluate.inception import FidInception


def made_up_weights() -> dict[str, torch.Tensor]:
    """A state dict of sines, at a scale that keeps the features' size through the layers."""
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in FidInception().state_dict().items()}
    weights = {}
    for number, (name, shape) in enumerate(shapes.items()):
        if name.endswith("num_batches_tracked"):
            continue
        wave = torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * 0.7 + number).view(shape)
        if name.endswith(("running_var", "bn.weight")):
            value = 1 + wave / 4
        elif name.endswith(("bn.bias", "running_mean")):
            value = wave / 10
        else:
            value = wave / math.sqrt(math.prod(shape[1:]) or 1)
        weights[name] = value.float()
    return weights
