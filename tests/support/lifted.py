"""diffusers' schedulers in float64, run as its pipelines run them.

diffusers uses float32 in many places; the error of 1e-5 would hide small mistakes. Here `float32` means `float64` in a
scheduler's module while it runs, so that it differs from a table only by rounding.
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

from fastsd.sampling import advance
from fastsd.sampling.table import Table

SHAPE = (1, 3, 4, 2)
_generator = torch.Generator().manual_seed(0)


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=_generator, dtype=torch.float64)


_WEIGHT, _BIAS = _normal(24, 24) / math.sqrt(24), _normal(24)
NOISE, IMAGE = _normal(*SHAPE), _normal(*SHAPE)
DRAWS = _normal(128, *SHAPE)  # the noise of a run, in order


def toy_model(x: torch.Tensor, t: float) -> torch.Tensor:
    """A network that is nonlinear in the input and depends on the timestep, so that errors do not cancel."""
    return torch.tanh(x.reshape(1, -1) @ _WEIGHT.T + _BIAS * (t * 1e-3)).reshape(SHAPE)


@dataclass
class Run:
    """The record of a run.

    Attributes:
        states: the latent before the first network call and after each.
        inputs, timesteps: of each call.
        keep: the known part of an inpainted image after each call.
        draws: how often noise was sampled.
    """

    states: list[torch.Tensor]
    inputs: list[torch.Tensor] = field(default_factory=list)
    timesteps: list[float] = field(default_factory=list)
    keep: list[torch.Tensor] = field(default_factory=list)
    draws: int = 0


class _Widened:
    """A module (torch or numpy) whose float32 is float64."""

    def __init__(self, module: Any) -> None:
        self._module, self.float32 = module, module.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _SharedIncrements:
    """Replaces the Brownian tree of DPMSolverSDEScheduler: two intervals with the same start share their increments."""

    def __init__(self, sample_noise: Any) -> None:
        self._sample_noise, self._first = sample_noise, None

    def __call__(self, sigma: torch.Tensor, sigma_next: torch.Tensor) -> torch.Tensor:
        start, end, z = float(sigma), float(sigma_next), self._sample_noise()
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

    def sample_noise(*args: Any, **kwargs: Any) -> torch.Tensor:
        run.draws += 1
        return DRAWS[run.draws - 1]

    logging.disable(logging.WARNING)
    torch.set_default_dtype(torch.float64)
    vars(module).update(torch=_Widened(torch), np=_Widened(np), randn_tensor=sample_noise)
    if "BrownianTreeNoiseSampler" in before:
        vars(module)["BrownianTreeNoiseSampler"] = lambda *args, **kwargs: _SharedIncrements(sample_noise)
    try:
        yield
    finally:
        vars(module).clear()
        vars(module).update(before)
        torch.set_default_dtype(torch.float32)
        logging.disable(logging.NOTSET)


@dataclass(frozen=True)
class Case:
    """One run of a diffusers scheduler.

    Attributes:
        scheduler: its class.
        steps: the number of steps.
        config: the arguments of its constructor.
        start: from an image, the first of the steps that runs.
        step: the arguments of its `step`.
        timesteps, sigmas: replace those of the spacing.
        first: replaces the first timestep, where rounding decides.
        levels_of: another scheduler, with extra arguments, whose sigmas and timesteps are used.
        growing_order: pass LMS the order that its history allows.
        image_as_noise: the network predicts the sample, but the scheduler takes only noise.
    """

    scheduler: str
    steps: int
    config: tuple[tuple[str, Any], ...]
    start: int | None = None
    step: tuple[tuple[str, Any], ...] = ()
    timesteps: tuple[float, ...] | None = None
    sigmas: tuple[float, ...] | None = None
    first: float | None = None
    levels_of: tuple[str, tuple[tuple[str, Any], ...]] | None = None
    growing_order: bool = False
    image_as_noise: bool = False


@cache
def reference(case: Case) -> Run:
    """Run the loop of diffusers' pipelines; `keep` is the known part in its inpainting pipeline."""
    cls = scheduler_class(case.scheduler)
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


def scheduler_class(name: str) -> Any:
    if name != "DPMSolverSDEScheduler":
        return getattr(diffusers, name)
    # Its Brownian tree is replaced, so the package for that need not be installed.
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
    elif case.sigmas is not None:
        scheduler.set_timesteps(sigmas=list(case.sigmas))
    else:
        scheduler.set_timesteps(case.steps)
    if case.first is not None:
        scheduler.timesteps[0] = case.first
    if case.levels_of is not None:
        name, extra = case.levels_of
        source_class = scheduler_class(name)
        with _lifted(source_class, Run(states=[])):
            source = source_class(**dict(case.config), **dict(extra))
            source.set_timesteps(case.steps)
        torch.set_default_dtype(torch.float64)
        scheduler.sigmas, scheduler.timesteps = source.sigmas, source.timesteps
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


def run_table(table: Table, from_image: bool) -> Run:
    """Run the table on the toy model, through `fastsd.sampling.advance`."""
    state = advance.begin(table, NOISE, IMAGE if from_image else None)
    run = Run(states=[state.x.clone()])
    while not state.done:
        x_in, t = advance.model_input(state).clone(), advance.timestep(state)
        noise = None
        if advance.draws_noise(state):
            noise = DRAWS[run.draws]
            run.draws += 1
        advance.step(state, toy_model(x_in, t), noise_i=noise)
        run.inputs.append(x_in)
        run.timesteps.append(t)
        run.states.append(state.x.clone())
        signal, sigma = table.keep[state.index - 1]
        run.keep.append(signal * IMAGE + sigma * NOISE)
    return run


def difference(ours: Run, theirs: Run) -> float:
    """The largest relative difference of any state, model input or inpainting level; inf if their counts differ."""
    worst = 0.0
    for xs, ys in ((ours.states, theirs.states), (ours.inputs, theirs.inputs), (ours.keep, theirs.keep)):
        if len(xs) != len(ys):
            return float("inf")
        for x, y in zip(xs, ys):
            error = float((x - y).abs().max() / y.abs().max())
            worst = max(worst, error if error == error else float("inf"))
    return worst
