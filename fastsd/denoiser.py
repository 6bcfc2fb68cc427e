"""One row of the sampler's table: the UNet, guidance and the update, eagerly or as the replay of one graph.

What a graph must not fix is in buffers: the state with its table and row, the row's time embedding, keys and values of
the text, guidance. So one graph serves every sampler, number of steps, prompt, seed, guidance scale and strength.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from fastsd.config import SchedulerConfig
from fastsd.graph import Graphs, circumstances
from fastsd.model.unet import UNet
from fastsd.sampling import advance
from fastsd.sampling.schedule import alphas_cumprod

MAX_ROWS = 2048  # of a static table: 1000 steps of a sampler that calls the network twice


@dataclass(eq=False)
class Run:
    """The tensors of one batch on its way through the table.

    Attributes:
        state: the sampler's; while a graph works on this run, its buffers are the graph's.
        time: `[rows, 1 or UNet samples, sum of channels]`, the projected time embeddings.
        key_values: of every cross-attention, `[UNet samples, L, 2, heads, D]` each; another tuple of the same shapes
            may take their place between two rows.
        guidance: `[1]` fp32, or None: no unconditional half.
        rescale: `[1]` fp32, the share of guidance rescaling, or None.
        extra_channels: `[n, h, w, 5]`, mask and masked picture of an inpainting UNet, or None.
    """

    state: advance.State
    time: torch.Tensor
    key_values: tuple[torch.Tensor, ...]
    guidance: torch.Tensor | None = None
    rescale: torch.Tensor | None = None
    extra_channels: torch.Tensor | None = None
    key: Hashable = None  # of its graph, once it has stepped on one

    def constants(self) -> tuple[torch.Tensor | None, ...]:
        """What stays the same over the rows."""
        return (self.guidance, self.rescale, self.extra_channels)


@dataclass
class _Static:
    """A graph's buffers: those of a run, with the time embedding of one row; and whose contents they have."""

    buffers: Run
    owner: Callable[[], Run | None] = lambda: None
    key_values: tuple[torch.Tensor, ...] = ()  # the owner's, which were copied


class Estimate(NamedTuple):
    """What the network was given and said of a batch's first image, `[1, h, w, C]` each; at no timestep it is done."""

    x_in: torch.Tensor
    out: torch.Tensor
    timestep: float | None

    def denoised(self, scheduler: SchedulerConfig) -> torch.Tensor:
        """The clean latent that the network's (conditional) output speaks for, `[1, h, w, C]`."""
        if self.timestep is None:
            return self.x_in
        levels, out = alphas_cumprod(scheduler), self.out.float()
        signal = float(levels[min(max(round(self.timestep), 0), len(levels) - 1)])
        alpha, sigma = signal**0.5, (1.0 - signal) ** 0.5
        if scheduler.prediction_type == "sample":
            return out
        if scheduler.prediction_type == "v_prediction":
            return alpha * self.x_in - sigma * out
        return (self.x_in - sigma * out) / max(alpha, 1e-3)


class Denoiser:
    """Takes runs forward row by row."""

    def __init__(self, unet: UNet, dtype: torch.dtype, graphs: Graphs):
        self.unet, self.dtype, self.graphs = unet, dtype, graphs

    def step(self, run: Run, noise: torch.Tensor | None) -> torch.Tensor:
        """Do the current row of `run`.

        Args:
            noise: `[n, h, w, C]`, where the row draws.

        Returns:
            The UNet's output, `[n or 2n, h, w, C]`; good until the next step of any run.
        """
        captured = None
        if self.graphs.active:
            run.key = run.key or (circumstances(self.unet), _shapes(run))
            captured = self.graphs.captured(run.key, lambda: self._make(run))
        if captured is not None:
            static: _Static = captured.buffers
            _claim(static, run)
        if noise is not None:
            run.state.noise[0].copy_(noise)
        time = run.time[run.state.index]
        if captured is None:
            out = self._row(run, time)
        else:
            static.buffers.time.copy_(time)
            out = captured.replay()
        run.state.index += 1
        return out

    def _row(self, run: Run, time: torch.Tensor) -> torch.Tensor:
        """All that happens on the device; nothing here may depend on a number of the host."""
        x = run.state.x_in
        if run.extra_channels is not None:
            x = torch.cat([x, run.extra_channels], dim=-1)
        if run.guidance is not None:
            x = torch.cat([x, x])
        out = self.unet.denoise(x.to(self.dtype), time, run.key_values)
        advance.update(run.state, out, run.guidance, run.rescale)
        return out

    def _make(self, run: Run) -> tuple[_Static, Callable[[], torch.Tensor]]:
        buffers = Run(
            run.state.copy(MAX_ROWS),
            run.time[0].clone(),
            tuple(x.clone() for x in run.key_values),
            *(None if x is None else x.clone() for x in run.constants()),
        )
        return _Static(buffers), lambda: self._row(buffers, buffers.time)


def _shapes(run: Run) -> Hashable:
    tensors = (*run.key_values, *run.constants())
    shapes = tuple(None if x is None else (tuple(x.shape), x.dtype) for x in tensors)
    return ("step", tuple(run.state.x.shape), tuple(run.time.shape[1:]), shapes)


def _claim(static: _Static, run: Run) -> None:
    """Make the graph's buffers those of `run`, after saving the state of the run whose they were."""
    before, buffers = static.owner(), static.buffers
    if before is not run:
        if before is not None:
            before.state = before.state.copy()
        for buffer, x in zip(buffers.constants(), run.constants(), strict=True):
            if buffer is not None and x is not None:
                buffer.copy_(x)
        buffers.state.load(run.state)
        run.state = replace(buffers.state, plan=run.state.plan, index=run.state.index)
        static.owner, static.key_values = weakref.ref(run), ()
    if static.key_values is not run.key_values:
        for buffer, x in zip(buffers.key_values, run.key_values, strict=True):
            buffer.copy_(x)
        static.key_values = run.key_values
