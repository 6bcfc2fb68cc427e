"""One row of the sampler's table: the UNet, guidance and the update, eagerly or as the replay of one graph.

What a graph must not fix is in buffers: the state with its table and row, the row's time embedding, keys and values of
the text, guidance. So one graph serves every sampler, number of steps, prompt, seed, guidance scale and strength.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import NamedTuple, cast

import torch

from fastsd.config import SchedulerConfig
from fastsd.graph import Graphs, circumstances
from fastsd.model.controlnet import ControlNet
from fastsd.model.unet import UNet
from fastsd.sampling import advance
from fastsd.sampling.schedule import alphas_cumprod

MAX_ROWS = 2048  # of a static table: 1000 steps of a sampler that calls the network twice


@dataclass(eq=False)
class Told:
    """What a network is told beside the latent.

    Attributes:
        time: `[rows, 1 or UNet samples, sum of channels]`, the projected time embeddings.
        key_values: of every cross-attention, `[UNet samples, L, 2, heads, D]` each; another tuple of the same shapes
            may take their place between two rows.
    """

    time: torch.Tensor
    key_values: tuple[torch.Tensor, ...] = ()


@dataclass(eq=False)
class Controller:
    """A ControlNet at work.

    Attributes:
        hint: `[1, h, w, C]`, its picture as its first layers see it.
        weight: `[1]` fp32.
        active: the rows in which it takes part.
    """

    net: ControlNet
    told: Told
    hint: torch.Tensor
    weight: torch.Tensor
    active: frozenset[int] = frozenset()


@dataclass(eq=False)
class Run:
    """The tensors of one batch on its way through the table.

    Attributes:
        state: the sampler's; while a graph works on this run, its buffers are the graph's.
        told: what the UNet is told.
        guidance: `[1]` fp32, or None: no unconditional half.
        rescale: `[1]` fp32, the share of guidance rescaling, or None.
        extra_channels: `[n, h, w, 5]`, mask and masked picture of an inpainting UNet, or None.
        controllers: the ControlNets that take part in the current row.
    """

    state: advance.State
    told: Told
    guidance: torch.Tensor | None = None
    rescale: torch.Tensor | None = None
    extra_channels: torch.Tensor | None = None
    controllers: tuple[Controller, ...] = ()
    keys: dict[Hashable, Hashable] = field(default_factory=dict)  # of its graphs, by who takes part

    def constants(self) -> tuple[torch.Tensor | None, ...]:
        """What stays the same over the rows."""
        controls = (x for controller in self.controllers for x in (controller.hint, controller.weight))
        return (self.guidance, self.rescale, self.extra_channels, *controls)

    def all_told(self) -> tuple[Told, ...]:
        """What each network that takes part is told, the UNet first."""
        return (self.told, *(controller.told for controller in self.controllers))


@dataclass
class _Static:
    """A graph's buffers: those of a run, with the time embeddings of one row; and whose contents they have."""

    buffers: Run
    owner: Callable[[], Run | None] = lambda: None
    key_values: list[tuple[torch.Tensor, ...]] = field(default_factory=list)  # the owner's, which were copied


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
            captured = self.graphs.captured(self._key(run), lambda: self._make(run))
        if captured is not None:
            static: _Static = captured.buffers
            _claim(static, run)
        if noise is not None:
            run.state.noise[0].copy_(noise)
        row = run.state.index
        if captured is None:
            out = self._row(run, row)
        else:
            for buffer, told in zip(static.buffers.all_told(), run.all_told(), strict=True):
                buffer.time[0].copy_(told.time[row])
            out = captured.replay()
        run.state.index += 1
        return out

    def _row(self, run: Run, row: int) -> torch.Tensor:
        """All that happens on the device; nothing here may depend on a number of the host but `row`, of the times."""
        x = run.state.x_in
        guided = run.guidance is not None
        control = None
        for one in run.controllers:
            latent = (torch.cat([x, x]) if guided else x).to(self.dtype)
            added = one.net.denoise(latent, one.told.time[row], one.told.key_values, one.hint, one.weight)
            control = added if control is None else [a + b for a, b in zip(control, added, strict=True)]
        if run.extra_channels is not None:
            x = torch.cat([x, run.extra_channels], dim=-1)
        if guided:
            x = torch.cat([x, x])
        out = self.unet.denoise(x.to(self.dtype), run.told.time[row], run.told.key_values, control)
        advance.update(run.state, out, run.guidance, run.rescale)
        return out

    def _key(self, run: Run) -> Hashable:
        """Of the graph for the networks that take part in this row; worked out once for each such set."""
        taking_part = (id(self), *map(id, run.controllers))
        if taking_part not in run.keys:
            networks = (self.unet, *(controller.net for controller in run.controllers))
            run.keys[taking_part] = (*map(circumstances, networks), _shapes(run))
        return run.keys[taking_part]

    def _make(self, run: Run) -> tuple[_Static, Callable[[], torch.Tensor]]:
        def copy(told: Told) -> Told:
            return Told(told.time[:1].clone(), tuple(x.clone() for x in told.key_values))

        def steered(one: Controller) -> Controller:
            # A graph keeps no ControlNet that nobody else has: it is found by where the weights are, so never again
            # once they are gone, unless others of the same shapes are in the very same places.
            net = cast(ControlNet, weakref.proxy(one.net))
            return Controller(net, copy(one.told), one.hint.clone(), one.weight.clone())

        def own(x: torch.Tensor | None) -> torch.Tensor | None:
            return None if x is None else x.clone()

        buffers = Run(
            run.state.copy(MAX_ROWS),
            copy(run.told),
            own(run.guidance),
            own(run.rescale),
            own(run.extra_channels),
            tuple(steered(one) for one in run.controllers),
        )
        return _Static(buffers), lambda: self._row(buffers, 0)


def _shapes(run: Run) -> Hashable:
    shapes = tuple(None if x is None else (tuple(x.shape), x.dtype) for x in run.constants())
    told = tuple((tuple(one.time.shape[1:]), *(tuple(x.shape) for x in one.key_values)) for one in run.all_told())
    return ("step", tuple(run.state.x.shape), shapes, told)


def _claim(static: _Static, run: Run) -> None:
    """Make the graph's buffers those of `run`, after saving the state of the run whose they were.

    A run whose networks change from row to row goes from graph to graph: it may have been here before, and its state be
    elsewhere since.
    """
    before, buffers = static.owner(), static.buffers
    if before is not run or run.state.x is not buffers.state.x:
        if before is not None and before is not run and before.state.x is buffers.state.x:
            before.state = before.state.copy()
        for buffer, x in zip(buffers.constants(), run.constants(), strict=True):
            if buffer is not None and x is not None:
                buffer.copy_(x)
        buffers.state.load(run.state)
        run.state = replace(buffers.state, plan=run.state.plan, index=run.state.index)
        static.owner, static.key_values = weakref.ref(run), [() for _ in run.all_told()]
    for i, (buffer_told, told) in enumerate(zip(buffers.all_told(), run.all_told(), strict=True)):
        if static.key_values[i] is not told.key_values:
            for buffer_one, x in zip(buffer_told.key_values, told.key_values, strict=True):
                buffer_one.copy_(x)
            static.key_values[i] = told.key_values
