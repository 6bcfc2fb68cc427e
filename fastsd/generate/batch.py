"""One batch of pictures: everything that is worked out before its loop, and one row of the loop."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from PIL import Image

from fastsd.components import Components
from fastsd.errors import FastsdError
from fastsd.generate.conditioning import Script, write_script
from fastsd.generate.denoiser import Controller, Denoiser, Estimate, Run, Told
from fastsd.generate.latents import Codec, InpaintMask, Noise, image_tensor, to_channels_last
from fastsd.generate.request import Request
from fastsd.graph import Graphs, chosen_convolutions
from fastsd.model.controlnet import ControlNet
from fastsd.sampling import advance


@contextmanager
def seconds(clock: dict[str, float], name: str) -> Iterator[None]:
    """Adds what passes to the clock."""
    tick = time.perf_counter()
    yield
    clock[name] += time.perf_counter() - tick


class Engine:
    """A checkpoint's networks with what runs them; and, for the last rows, another checkpoint's."""

    def __init__(
        self,
        components: Components,
        device: torch.device,
        dtype: torch.dtype,
        graphs: Graphs,
        refiner: Components | None = None,
    ):
        self.components, self.refiner = components, refiner
        self.device, self.dtype, self.graphs = device, dtype, graphs
        self.codec = Codec(components.vae, graphs)
        self.denoiser = Denoiser(components.unet, dtype, graphs)
        self.refining = None if refiner is None else Denoiser(refiner.unet, dtype, graphs)


@dataclass(frozen=True)
class Stage:
    """The rows of the table that one checkpoint does, and what its networks are told in them."""

    rows: range
    denoiser: Denoiser
    script: Script
    controllers: tuple[Controller, ...] = ()


@dataclass(frozen=True)
class Batch:
    """One batch on its way: the denoiser's tensors, and what happens to them between its rows."""

    run: Run
    stages: tuple[Stage, ...]
    noise: Noise
    start_noise: torch.Tensor  # [n, h, w, C]
    image: torch.Tensor | None  # [n, h, w, C]
    mask: torch.Tensor | None  # [1, h, w, 1]: latents outside it follow the picture

    @torch.inference_mode()
    def advance(self, device: torch.device) -> Estimate:
        """One row of the table: one call of the UNet, one update of the state."""
        run, state = self.run, self.run.state
        row = state.index
        stage = next(stage for stage in self.stages if row in stage.rows)
        run.told, *others = stage.script.at(row)
        for controller, told in zip(stage.controllers, others, strict=True):
            controller.told = told
        run.controllers = tuple(one for one in stage.controllers if row in one.active)
        x_in, timestep = advance.model_input(state)[:1].clone(), advance.timestep(state)
        fresh = self.noise.draw() if advance.draws(state) else None
        with chosen_convolutions(device):
            out = stage.denoiser.step(run, fresh)
        state = run.state
        if self.mask is not None and self.image is not None:
            advance.hold(state, self.image, self.start_noise, self.mask)
        return Estimate(x_in, out[-len(state.x) :][:1].clone(), timestep)


@torch.inference_mode()
def begin(
    engine: Engine,
    request: Request,
    which: slice,
    clock: dict[str, float],
    start: torch.Tensor | list[Image.Image] | None = None,
) -> Batch:
    """Everything that does not depend on the loop: text, time, pictures, noise.

    Args:
        engine: what runs the networks.
        request, which: the images.
        clock: "text" and "encode" are counted up.
        start: what to start from instead of the request's picture: latents `[n, h, w, C]`, or a picture for each image.
    """
    config = engine.components.vae.config
    seeds = request.seeds[which]
    height, width = request.height // config.downscale, request.width // config.downscale
    noise = Noise(seeds, config.latent_channels, height, width, engine.device)
    with seconds(clock, "text"):
        stages = write_stages(engine, request, which)

    with seconds(clock, "encode"):
        image, mask, extra, start_noise = _encode(engine, request, which, noise, start)
    pure_noise = request.mask is not None and request.strength == 1.0
    state = advance.begin(request.table, start_noise, None if pure_noise else image)
    guided, rescaled = request.guided, request.guidance_rescale > 0
    run = Run(
        state,
        Told(state.x),  # each row's own, see `Batch.advance`
        guidance=state.x.new_tensor([request.guidance_scale]) if guided else None,
        rescale=state.x.new_tensor([request.guidance_rescale]) if guided and rescaled else None,
        extra_channels=extra,
    )
    return Batch(run, stages, noise, start_noise, image, mask)


def write_stages(engine: Engine, request: Request, which: slice) -> tuple[Stage, ...]:
    """What each checkpoint's networks are told in its rows."""
    rows = len(request.table)
    turn = rows if request.refiner_row is None else request.refiner_row
    nets = [control.net for control in request.controls]

    def script(components: Components, own: range, told: list[ControlNet]) -> Script:
        return write_script(components, request, which, engine.device, engine.graphs, own, told)

    controllers = tuple(_controller(engine, request, k) for k in range(len(nets)))
    stages = [Stage(range(turn), engine.denoiser, script(engine.components, range(turn), nets), controllers)]
    if engine.refiner is not None and engine.refining is not None and turn < rows:
        own = range(turn, rows)
        stages.append(Stage(own, engine.refining, script(engine.refiner, own, [])))
    return tuple(stages)


def _controller(engine: Engine, request: Request, k: int) -> Controller:
    """A request's k-th ControlNet with its picture read."""
    control = request.controls[k]
    picture = (image_tensor(control.image) + 1.0) / 2.0  # [0, 1]
    with chosen_convolutions(engine.device):
        hint = control.net.embed_hint(picture.to(engine.device, engine.dtype))
    weight = torch.tensor([control.weight], dtype=torch.float32, device=engine.device)
    return Controller(control.net, Told(hint), hint, weight, control.active(request.table))


def _encode(
    engine: Engine,
    request: Request,
    which: slice,
    noise: Noise,
    start: torch.Tensor | list[Image.Image] | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
    """What the batch starts from: latents of the picture, the mask, an inpainting UNet's channels, the noise."""
    config, codec = engine.components.vae.config, engine.codec
    image = mask = extra = None
    inpaints = engine.components.unet.config.in_channels == 2 * config.latent_channels + 1
    if isinstance(start, torch.Tensor):
        image = start
    elif start is not None:
        drawn = noise.draw()
        parts = [
            codec.encode(image_tensor(picture), own[None], request.vae_tiling)
            for picture, own in zip(start, drawn, strict=True)
        ]
        image = torch.cat(parts)
    elif request.image is not None and not (inpaints and request.strength == 1.0):
        image = codec.encode(image_tensor(request.image), noise.draw(), request.vae_tiling)
    given = request.latents
    start_noise = noise.draw() if given is None else to_channels_last(given[which]).to(engine.device)
    if request.image is not None and request.mask is not None:
        regions = InpaintMask.from_image(request.mask, config.downscale)
        if inpaints:
            kept = image_tensor(request.image) * (regions.pixels < 0.5)
            masked = codec.encode(kept, noise.draw(), request.vae_tiling)
            count = len(request.seeds[which])
            extra = torch.cat([regions.latents.to(engine.device).expand(count, -1, -1, -1), masked], dim=-1)
        else:
            mask = regions.latents.to(engine.device)
    return image, mask, extra, start_noise


def check_refiner(components: Components, refiner: Components) -> None:
    """Refuse a second checkpoint that reads other latents, or noise of another schedule.

    Raises:
        FastsdError: it does; the message says in what they differ.
    """
    names = ("prediction_type", "num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
    for name in names:
        first, second = getattr(components.scheduler, name), getattr(refiner.scheduler, name)
        if first != second:
            raise FastsdError(f"refiner: its {name} is {second} and the model's {first}; both should be of one family")
    channels = components.vae.config.latent_channels
    if components.unet.config.in_channels != channels or refiner.unet.config.in_channels != channels:
        raise FastsdError(f"refiner: model and refiner should both read {channels} channels; one is for inpainting")
    if components.xl != refiner.xl:  # the autoencoders of SD 1 and 2 and of SDXL make different latents
        xl, other = ("model", "refiner") if components.xl else ("refiner", "model")
        raise FastsdError(f"refiner: the {xl} is of SDXL's family and the {other} is not; both should be of one")
