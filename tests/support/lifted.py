"""diffusers' own schedulers, computing in float64, run the way its pipelines run them.

diffusers fixes float32 in many places, which costs 1e-5 and would hide small mistakes. Here every mention of `float32`
in a scheduler's module means `float64` while it runs, so that what is left between it and a table is rounding.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import math
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import diffusers
import numpy as np
import torch

SHAPE = (1, 3, 4, 2)
_generator = torch.Generator().manual_seed(0)


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=_generator, dtype=torch.float64)


_WEIGHT, _BIAS = _normal(24, 24) / math.sqrt(24), _normal(24)
NOISE, IMAGE = _normal(*SHAPE), _normal(*SHAPE)
DRAWS = _normal(128, *SHAPE)  # what a run draws, in order


def toy_model(x: torch.Tensor, t: float) -> torch.Tensor:
    """A nonlinear network of the input and the timestep, so that no error can cancel."""
    return torch.tanh(x.reshape(1, -1) @ _WEIGHT.T + _BIAS * (t * 1e-3)).reshape(SHAPE)


@dataclass
class Run:
    """What happened: model inputs, timesteps, the latent before and after every call, inpainting levels, draws."""

    states: list[torch.Tensor]
    inputs: list[torch.Tensor] = field(default_factory=list)
    timesteps: list[float] = field(default_factory=list)
    keep: list[torch.Tensor] = field(default_factory=list)
    draws: int = 0


class _Widened:
    """A module whose float32 is float64."""

    def __init__(self, module: Any) -> None:
        self._module, self.float32 = module, module.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _SharedIncrements:
    """Stands for the Brownian tree of DPMSolverSDEScheduler: two intervals with one start share their increments."""

    def __init__(self, draw: Any) -> None:
        self._draw, self._first = draw, None

    def __call__(self, sigma: torch.Tensor, sigma_next: torch.Tensor) -> torch.Tensor:
        start, end, z = float(sigma), float(sigma_next), self._draw()
        if self._first and self._first[0] == start:
            _, inner, z_inner = self._first
            r, self._first = (start - inner) / (start - end), None
            return math.sqrt(r) * z_inner + math.sqrt(1 - r) * z
        self._first = (start, end, z)
        return z


@contextlib.contextmanager
def _lifted(scheduler: type, run: Run) -> Iterator[None]:
    module = importlib.import_module(scheduler.__module__)
    before = dict(vars(module))

    def draw(*args: Any, **kwargs: Any) -> torch.Tensor:
        run.draws += 1
        return DRAWS[run.draws - 1]

    logging.disable(logging.WARNING)
    torch.set_default_dtype(torch.float64)
    vars(module).update(torch=_Widened(torch), np=_Widened(np), randn_tensor=draw)
    if "BrownianTreeNoiseSampler" in before:
        vars(module)["BrownianTreeNoiseSampler"] = lambda *args, **kwargs: _SharedIncrements(draw)
    try:
        yield
    finally:
        vars(module).clear()
        vars(module).update(before)
        torch.set_default_dtype(torch.float32)
        logging.disable(logging.NOTSET)


@dataclass(frozen=True)
class Case:
    """One run of a diffusers scheduler. config: its constructor's arguments. step: those of its `step`.

    start: the first of the user's steps, from an image. timesteps: visit these instead of the spacing's. first: what
    the first timestep is, where rounding decides. levels_of: take sigmas and timesteps from this other scheduler with
    its extra arguments. growing_order: pass LMS the order that its history allows.
    """

    scheduler: str
    steps: int
    config: tuple[tuple[str, Any], ...]
    start: int | None = None
    step: tuple[tuple[str, Any], ...] = ()
    timesteps: tuple[float, ...] | None = None
    first: float | None = None
    levels_of: tuple[str, tuple[tuple[str, Any], ...]] | None = None
    growing_order: bool = False
    image_as_noise: bool = False  # the network predicts the sample, the scheduler only knows noise


@cache
def reference(case: Case) -> Run:
    """Run the loop of diffusers' pipelines; `keep` is what its inpainting pipeline puts outside the mask."""
    cls = _scheduler_class(case.scheduler)
    run = Run(states=[])
    with _lifted(cls, run):
        scheduler = _prepared(cls, case)
        order = getattr(scheduler, "order", 1)
        times = scheduler.timesteps[(case.start or 0) * order :]
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index((case.start or 0) * order)
        if case.start is None:
            x = NOISE * float(scheduler.init_noise_sigma)
        else:
            x = scheduler.add_noise(IMAGE, NOISE, times[:1])
        run.states.append(x)
        for i, t in enumerate(times):
            x_in = scheduler.scale_model_input(x, t)
            out = toy_model(x_in, float(t))
            if case.image_as_noise:
                out = _as_noise(scheduler, out, x, x_in, t)
            arguments = dict(case.step)
            if case.growing_order:
                arguments["order"] = min(i + 1, 4)
            x = scheduler.step(out, t, x, **arguments).prev_sample
            run.inputs.append(x_in)
            run.timesteps.append(float(t))
            run.states.append(x)
            last = i + 1 == len(times)
            run.keep.append(IMAGE if last else scheduler.add_noise(IMAGE, NOISE, times[i + 1 : i + 2]))
    return run


def _scheduler_class(name: str) -> Any:
    if name != "DPMSolverSDEScheduler":
        return getattr(diffusers, name)
    # Its Brownian tree is replaced here, so it need not find the package that grows one.
    absent = "torchsde" not in sys.modules and importlib.util.find_spec("torchsde") is None
    if absent:
        sys.modules["torchsde"] = types.ModuleType("torchsde")
    try:
        return importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde").DPMSolverSDEScheduler
    finally:
        if absent:
            del sys.modules["torchsde"]


def _prepared(cls: type, case: Case) -> Any:
    scheduler = cls(**dict(case.config))
    if case.timesteps is not None:
        scheduler.set_timesteps(timesteps=list(case.timesteps))
    else:
        scheduler.set_timesteps(case.steps)
    if case.first is not None:
        scheduler.timesteps[0] = case.first
    if case.levels_of is not None:
        name, extra = case.levels_of
        other_class = _scheduler_class(name)
        with _lifted(other_class, Run(states=[])):
            other = other_class(**dict(case.config), **dict(extra))
            other.set_timesteps(case.steps)
        torch.set_default_dtype(torch.float64)
        scheduler.sigmas, scheduler.timesteps = other.sigmas, other.timesteps
    return scheduler


def _as_noise(
    scheduler: Any, image: torch.Tensor, x: torch.Tensor, x_in: torch.Tensor, t: torch.Tensor
) -> torch.Tensor:
    """The noise that a prediction of the image implies."""
    if hasattr(scheduler, "sigmas"):
        sigma = ((x * x).sum() / (x_in * x_in).sum() - 1).sqrt()  # x_in = x / sqrt(sigma^2 + 1)
        return (x - image) / sigma
    alpha_bar = scheduler.alphas_cumprod[t]
    return (x - alpha_bar.sqrt() * image) / (1 - alpha_bar).sqrt()
