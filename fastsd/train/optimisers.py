"""Optimisers, their learning rate, and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from fastsd.errors import FastsdError
from fastsd.train.settings import Fit
from fastsd.train.sharding import is_divided


def learning_rate(fit: Fit, step: int) -> float:
    """Linear warm-up, then cosine decay from `rate` to `final_rate * rate` at the last step, or `rate` for good."""
    if step < fit.warmup:
        return fit.rate * (step + 1) / fit.warmup
    if fit.schedule == "constant":
        return fit.rate
    progress = min((step - fit.warmup) / max(fit.steps - fit.warmup, 1), 1.0)
    return fit.rate * (fit.final_rate + (1 - fit.final_rate) * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimiser(fit: Fit, parameters: list[nn.Parameter], device: torch.device) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019), with its state in 32 or in 8 bits (Dettmers et al. 2022).

    Raises:
        FastsdError: 8 bits without bitsandbytes, or on another device than a GPU.
    """
    options = {"lr": fit.rate, "betas": fit.betas, "weight_decay": fit.weight_decay}
    if fit.optimiser == "adamw":
        return torch.optim.AdamW(parameters, **options)  # type: ignore[arg-type]
    name = "fit.optimiser"
    if device.type != "cuda":
        raise FastsdError("needs a GPU; on the CPU use adamw", argument=name, value=fit.optimiser)
    try:
        import bitsandbytes
    except ImportError:
        raise FastsdError(
            "needs the package bitsandbytes; pip install bitsandbytes, or use adamw", argument=name, value=fit.optimiser
        ) from None
    return bitsandbytes.optim.AdamW8bit(parameters, **options)


class Average:
    """Exponentially averaged weights (Polyak and Juditsky 1992) of a network's trained parameters.

    Attributes:
        values: the averages, in the order of the parameters; the parameters themselves where `decay` is 0.
    """

    def __init__(self, parameters: list[nn.Parameter], decay: float):
        self.parameters, self.decay = parameters, decay
        self.values: list[torch.Tensor] = [p.detach().clone() for p in parameters] if decay else list(parameters)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the weights; faster at first, so that it soon forgets the initial weights."""
        if self.decay:
            weight = 1 - min(self.decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(self.values, [p.detach() for p in self.parameters], weight)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the context, the network has the averaged weights."""
        self.exchange()
        try:
            yield
        finally:
            self.exchange()

    @torch.no_grad()
    def exchange(self) -> None:
        """Exchange the weights and their averages, without a copy where the weights are whole."""
        if self.decay:
            for i, parameter in enumerate(self.parameters):
                if is_divided(parameter):  # FSDP reads the memory that its share has had from the beginning
                    kept = parameter.detach().clone()
                    parameter.copy_(self.values[i])
                    self.values[i] = kept
                else:
                    parameter.data, self.values[i] = self.values[i], parameter.data
