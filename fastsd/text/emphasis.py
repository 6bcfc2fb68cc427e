"""What the weights of a prompt do to the text encoder's output, by the name of the rule."""

from __future__ import annotations

from collections.abc import Callable

import torch

# What a rule makes of `hidden` `[1, L, D]`, of the weights `[1, L, 1]` and of the encoding of an empty text
# `[1, L, D]`: `[1, L, D]`. All are fp32.
Rule = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def original(hidden: torch.Tensor, weights: torch.Tensor, empty: torch.Tensor) -> torch.Tensor:
    """A1111's "Original": `z = w h`, then `z mean(h) / mean(z)`; the means are over all tokens and channels."""
    weighted = hidden * weights
    ratio = hidden.mean() / weighted.mean()
    return weighted * torch.where(ratio.isfinite(), ratio, 1.0)  # negative weights can make the mean 0


def no_norm(hidden: torch.Tensor, weights: torch.Tensor, empty: torch.Tensor) -> torch.Tensor:
    """A1111's "No norm": `w h`."""
    return hidden * weights


def comfy(hidden: torch.Tensor, weights: torch.Tensor, empty: torch.Tensor) -> torch.Tensor:
    """ComfyUI's: `w (h - e) + e`, from an empty text's encoding `e` through the text's own."""
    return torch.where(weights == 1.0, hidden, (hidden - empty) * weights + empty)


# "none" (A1111's "None": brackets are text) and "ignore" (A1111's "Ignore": weights are read and left out) give no
# token a weight.
RULES: dict[str, Rule | None] = {
    "original": original,
    "no_norm": no_norm,
    "none": None,
    "ignore": None,
    "comfy": comfy,
}
