"""One batch of images: everything that is computed before its loop, and one row of the loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from fastsd.components import Components
from fastsd.config import SchedulerConfig
from fastsd.cuda.cudnn import fixed_convolutions
from fastsd.errors import FastsdError
from fastsd.generate.conditioning import ConditioningSchedule, PromptKeyValues, schedule_conditioning
from fastsd.generate.control import Control
from fastsd.generate.denoiser import (
    ActiveControl,
    CapturedStep,
    Conditioning,
    GuidanceScales,
    StepInputs,
    denoise_row,
)
from fastsd.generate.image_prompts import FittedPrompt
from fastsd.generate.latents import Codec, image_tensor
from fastsd.generate.masks import free_latents
from fastsd.generate.noise import Noise
from fastsd.generate.options import options_by_row
from fastsd.generate.request import Pass
from fastsd.generate.samples import NEGATIVE, RowSamples, samples_by_row
from fastsd.generate.start import Start, start_batch
from fastsd.graph import Graphs
from fastsd.model.call_options import CallOptions
from fastsd.model.controlnet import ControlNet
from fastsd.model.t2i_adapter import T2IAdapter
from fastsd.model.unet import UNet
from fastsd.sampling import advance
from fastsd.sampling.edm import precondition
from fastsd.sampling.schedule import alphas_cumprod

Timings = dict[str, float]


@contextmanager
def timed(timings: Timings, name: str) -> Iterator[None]:
    """Adds the seconds that pass inside to `timings[name]`."""
    started = time.perf_counter()
    yield
    timings[name] += time.perf_counter() - started


@dataclass
class Engine:
    """What runs a pipeline's networks: the checkpoint, a second one for the last rows, the device, the graphs."""

    components: Components
    device: torch.device
    dtype: torch.dtype
    graphs: Graphs
    refiner: Components | None = None

    def __post_init__(self) -> None:
        self.codec = Codec(self.components.vae, self.graphs)


@dataclass(frozen=True)
class ScheduledControl:
    """A ControlNet with its encoded image, and the rows in which it takes part."""

    net: ControlNet
    hint: torch.Tensor
    weight: torch.Tensor
    rows: frozenset[int]


@dataclass(frozen=True, eq=False)
class ScheduledAdapter:
    """A T2I-Adapter's maps, times its weight, and the rows in which they are added."""

    maps: tuple[torch.Tensor, ...]
    rows: frozenset[int]


@dataclass(frozen=True)
class Segment:
    """The rows of the table that one checkpoint does, with the conditioning of its networks."""

    rows: range
    unet: UNet
    conditioning: ConditioningSchedule
    controls: tuple[ScheduledControl, ...] = ()
    adapters: tuple[ScheduledAdapter, ...] = ()
    _sums: dict[tuple[ScheduledAdapter, ...], tuple[torch.Tensor, ...]] = field(default_factory=dict, repr=False)

    def condition(self, inputs: StepInputs, row: int) -> None:
        """Give the networks of a row their conditioning."""
        inputs.conditioning, *others = self.conditioning.at(row)
        inputs.controls = tuple(
            ActiveControl(control.net, conditioning, control.hint, control.weight)
            for control, conditioning in zip(self.controls, others, strict=True)
            if row in control.rows
        )
        inputs.adapter = self._sum(tuple(adapter for adapter in self.adapters if row in adapter.rows))

    def _sum(self, active: tuple[ScheduledAdapter, ...]) -> tuple[torch.Tensor, ...]:
        """What several T2I-Adapters add to each level, made once for each set of them."""
        if active not in self._sums:
            levels = zip(*(adapter.maps for adapter in active), strict=True)
            self._sums[active] = tuple(torch.stack(maps).sum(0) for maps in levels)
        return self._sums[active]


class Estimate(NamedTuple):
    """The network's input and output for a batch's first image, `[1, h, w, C]` each; without a timestep: the result."""

    x_in: torch.Tensor
    out: torch.Tensor
    timestep: float | None

    def denoised(self, scheduler: SchedulerConfig) -> torch.Tensor:
        """The clean latent that the (conditional) output predicts, `[1, h, w, C]`."""
        if self.timestep is None:
            return self.x_in
        out = self.out.float()
        if scheduler.edm is not None:
            c_in, c_skip, c_out = precondition(scheduler.edm, scheduler.prediction_type, math.exp(4 * self.timestep))
            return c_skip / c_in * self.x_in + c_out * out
        levels = alphas_cumprod(scheduler)
        signal = float(levels[min(max(round(self.timestep), 0), len(levels) - 1)])
        alpha, sigma = signal**0.5, (1.0 - signal) ** 0.5
        if scheduler.prediction_type == "sample":
            return out
        if scheduler.prediction_type == "v_prediction":
            return alpha * self.x_in - sigma * out
        return (self.x_in - sigma * out) / max(alpha, 1e-3)


@dataclass(frozen=True)
class Batch:
    """One batch on its way through the table.

    scales, options: of each row.
    """

    engine: Engine
    inputs: StepInputs
    segments: tuple[Segment, ...]
    scales: tuple[GuidanceScales, ...]
    options: tuple[CallOptions, ...]
    noise: Noise
    start: Start

    @torch.inference_mode()
    def denoise(self) -> Estimate:
        """One row of the table: one call of the UNet, one update of the latent."""
        inputs, row = self.inputs, self.inputs.state.index
        segment = next(segment for segment in self.segments if row in segment.rows)
        segment.condition(inputs, row)
        inputs.scales, inputs.options = self.scales[row], self.options[row]
        x_in, timestep = inputs.state.x_in[:1].clone(), advance.timestep(inputs.state)
        with fixed_convolutions(self.engine.device):
            step = self._load_graph(segment.unet)
            if advance.draws_noise(inputs.state):
                inputs.state.noise[0].copy_(self.noise.sample())
            out = denoise_row(segment.unet, inputs, row) if step is None else step()
        inputs.state.index += 1
        if self.start.mask is not None and self.start.image is not None:
            mask = free_latents(self.start.mask, inputs.state.host_table, row)
            advance.restore_known(inputs.state, self.start.image, self.start.noise, mask)
        return Estimate(x_in, out[-len(inputs.state.x) :][:1].clone(), timestep)

    def _load_graph(self, unet: UNet) -> Callable[[], torch.Tensor] | None:
        """The replay of a captured row, loaded with this batch; None where nothing is captured."""
        graphs = self.engine.graphs
        if not graphs.active:
            return None
        captured = graphs.captured(CapturedStep.key(unet, self.inputs), lambda: CapturedStep(unet, self.inputs))
        if captured is None:
            return None
        step: CapturedStep = captured.work
        step.load(self.inputs)

        def replay() -> torch.Tensor:
            out: torch.Tensor = captured.replay()
            step.give_back(self.inputs)
            return out

        return replay

    @torch.inference_mode()
    def replace_latents(self, latents: torch.Tensor) -> None:
        """Go on from other latents `[n, h, w, C]`."""
        state = self.inputs.state
        state.x.copy_(latents)
        state.x_in.copy_(state.table[state.index, 1] * state.x)

    @property
    def latents(self) -> torch.Tensor:
        """The state `[n, h, w, C]` fp32, as a copy that later rows do not change."""
        return self.inputs.state.x.clone()


@torch.inference_mode()
def prepare(engine: Engine, stage: Pass, which: slice, first: torch.Tensor | None, timings: Timings) -> Batch:
    """Everything that does not depend on the loop: text, time, images, noise.

    Args:
        stage: the pass.
        which: the images of this batch, which have one guidance scale.
        first: `[n, h, w, C]`, the first pass's latents, in the second pass.
        timings: "text" and "encode" are counted up.
    """
    stage, config = stage.of(which), engine.components.vae.config
    height, width = stage.height // config.downscale, stage.width // config.downscale
    noise = Noise(stage.noise, which, config.latent_channels, height, width, engine.device)
    with timed(timings, "text"):
        segments = tuple(_segments(engine, stage, which))
    with timed(timings, "encode"):
        start = start_batch(engine.components, engine.codec, stage, which, noise, first)
    state = advance.begin(stage.table, start.noise, None if stage.starts_from_noise else start.image)
    rows = samples_by_row(stage)
    inputs = StepInputs(
        state,
        Conditioning(()),  # `Segment.condition` replaces it before each row
        extra_channels=_extra_channels(
            start.extra_channels, stage.parts, max((len(row.roles) for row in rows), default=1)
        ),
    )
    options = options_by_row(stage, engine.components.unet, rows, state.x)
    return Batch(engine, inputs, segments, _scales(stage, rows, engine.device), tuple(options), noise, start)


def _scales(stage: Pass, rows: Sequence[RowSamples], device: torch.device) -> tuple[GuidanceScales, ...]:
    """The scales of each row; rows of equal ones share them."""

    def tensor(value: float | None) -> torch.Tensor | None:
        return None if value is None else torch.tensor([value], dtype=torch.float32, device=device)

    share = stage.settings.guidance_rescale or None
    made = {
        one: GuidanceScales(
            tensor(one.guidance), tensor(one.image_guidance), tensor(share) if NEGATIVE in one.roles else None
        )
        for one in set(rows)
    }
    return tuple(made[one] for one in rows)


def _extra_channels(extra: torch.Tensor | None, parts: int, samples: int) -> torch.Tensor | None:
    """Of every UNet sample: the same for each, but where the image guides too, for the unconditional one, which reads
    zeros."""
    if extra is None or samples == 1:
        return extra
    return torch.cat([torch.zeros_like(extra) if parts == 3 else extra] + [extra] * (samples - 1))


def _segments(engine: Engine, stage: Pass, which: slice) -> Iterator[Segment]:
    """The checkpoint's rows, then the refiner's."""
    rows, own = len(stage.table), engine.components
    encoded = [_encode_control(engine, control, stage) for control in stage.controls]
    controls = tuple(one for one in encoded if isinstance(one, ScheduledControl))
    adapters = tuple(one for one in encoded if isinstance(one, ScheduledAdapter))
    nets = [control.net for control in controls]
    first = range(stage.refiner_row)
    images = tuple(
        _image_key_values(own.unet, prompt, stage, own.vae.config.downscale) for prompt in stage.image_prompts
    )
    conditioning = schedule_conditioning(own, stage, which, first, engine.graphs, engine.device, nets, images=images)
    yield Segment(first, own.unet, conditioning, controls, adapters)
    if engine.refiner is not None and len(first) < rows:
        last = range(len(first), rows)
        conditioning = schedule_conditioning(
            engine.refiner, stage, which, last, engine.graphs, engine.device, retokenize=True
        )
        yield Segment(last, engine.refiner.unet, conditioning)


def _image_key_values(unet: UNet, prompt: FittedPrompt, stage: Pass, downscale: int) -> PromptKeyValues:
    of = {negative: prompt.key_values(negative) for negative in (False, True)}
    return PromptKeyValues(of, prompt.masks(unet, stage.height // downscale, stage.width // downscale))


def _encode_control(engine: Engine, control: Control, stage: Pass) -> ScheduledControl | ScheduledAdapter:
    """What a control's net makes of its image, once for all rows."""
    if isinstance(control.net, T2IAdapter):
        grey = control.image.convert("L" if control.net.config.in_channels == 1 else "RGB")
        pixels = torch.from_numpy(np.array(grey, dtype=np.float32)).view(1, grey.height, grey.width, -1) / 255.0
        with fixed_convolutions(engine.device):
            maps = control.net(pixels.to(engine.device, engine.dtype))
        return ScheduledAdapter(tuple(control.weight * one for one in maps), control.rows(stage.table))
    image = (image_tensor(control.image) + 1.0) / 2.0  # [0, 1]
    with fixed_convolutions(engine.device):
        hint = control.net.embed_hint(image.to(engine.device, engine.dtype))
    weight = torch.tensor([control.weight], dtype=torch.float32, device=engine.device)
    return ScheduledControl(control.net, hint, weight, control.rows(stage.table))


def check_refiner(components: Components, refiner: Components) -> None:
    """Refuse a second checkpoint that reads other latents, or noise of another schedule.

    Raises:
        FastsdError: it names the difference.
    """
    names = ("prediction_type", "num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
    for name in names:
        first, second = getattr(components.scheduler, name), getattr(refiner.scheduler, name)
        if first != second:
            raise FastsdError(
                f"its {name} is {second} and the model's {first}; both should be of one family", argument="refiner"
            )
    channels = components.vae.config.latent_channels
    if components.unet.config.in_channels != channels or refiner.unet.config.in_channels != channels:
        raise FastsdError(
            f"model and refiner should both read {channels} channels, the latent alone; they read "
            f"{components.unet.config.in_channels} and {refiner.unet.config.in_channels}",
            argument="refiner",
        )
    if components.xl != refiner.xl:  # the autoencoders of SD 1 and 2 and of SDXL make different latents
        xl, other = ("model", "refiner") if components.xl else ("refiner", "model")
        raise FastsdError(
            f"the {xl} is of SDXL's family and the {other} is not; both should be of one", argument="refiner"
        )
