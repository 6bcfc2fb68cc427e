"""What a caller asks of the pipeline, checked before any work is done."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image

from fastsd.components import Components
from fastsd.config import SchedulerConfig
from fastsd.errors import FastsdError
from fastsd.generate.validation import (
    MAX_SIDE,
    Control,
    fit_latents,
    fit_pictures,
    left_out,
    listed,
    nothing_redone,
    number,
    resized,
    texts,
    word,
)
from fastsd.model.taesd import DECODES_ONLY
from fastsd.runtime import memory
from fastsd.sampling.samplers import build, resolve
from fastsd.sampling.table import Table
from fastsd.text.parse import Wording, read_wording

MAX_IMAGES = 1000
DEFAULT_BATCH = 8
MAX_STEPS = 1000
MAX_GUIDANCE = 100.0
MAX_SEED = 2**63 - 1
TILED_FROM = 2048 * 2048  # pixels above which the autoencoder works in tiles by itself
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
UPSCALERS = ("latent", "lanczos")
MAX_HIRES = 8.0
REFINER_SWITCH = 0.8


@dataclass(frozen=True)
class Request:
    """The arguments of one call, complete and in range. `Pipeline.__call__` documents the fields."""

    wording: Wording
    seeds: tuple[int, ...]
    table: Table  # the sampler, worked out for the steps that run
    num_inference_steps: int
    guidance_scale: float
    guided: bool  # an unconditional half runs beside the conditional one
    guidance_rescale: float
    width: int
    height: int
    sampler: str
    schedule: str
    eta: float
    clip_skip: int
    strength: float
    batch_size: int
    output_type: str
    vae_tiling: bool
    picture: memory.Picture  # what the memory that it takes depends on
    trained_steps: int  # of the noise schedule
    image: Image.Image | None = None  # RGB, width x height
    mask: Image.Image | None = None  # L, width x height
    latents: torch.Tensor | None = None  # [N, C, h, w]
    notes: tuple[str, ...] = ()
    controls: tuple[Control, ...] = ()  # their images RGB, width x height
    hires: Request | None = None  # the second pass, over the enlarged result of this one
    hires_scale: float | None = None
    hires_upscaler: str = "latent"
    refiner_switch: float | None = None

    @property
    def passes(self) -> tuple[Request, ...]:
        """This request and, where there is one, the second pass."""
        return (self,) if self.hires is None else (self, self.hires)

    @property
    def refiner_row(self) -> int | None:
        """The first row of the table that the refiner does.

        It takes over at the first step whose timestep lies below the share of them that `refiner_switch` leaves, as
        diffusers counts it.
        """
        if self.refiner_switch is None:
            return None
        times, steps = self.table.timesteps, self.table.step
        below = round(self.trained_steps * (1.0 - self.refiner_switch))
        starts = (row for row in range(len(times)) if row == 0 or steps[row] != steps[row - 1])
        return next((row for row in starts if times[row] < below), len(times))


def make_request(
    components: Components,
    defaults: dict[str, Any],
    prompt: str | list[str],
    negative_prompt: str | list[str] = "",
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    width: int | None = None,
    height: int | None = None,
    seed: int | None = None,
    sampler: str | None = None,
    schedule: str | None = None,
    num_images_per_prompt: int = 1,
    batch_size: int | None = None,
    image: Image.Image | None = None,
    mask_image: Image.Image | None = None,
    strength: float = 0.8,
    guidance_rescale: float = 0.0,
    eta: float = 0.0,
    clip_skip: int = 1,
    latents: torch.Tensor | None = None,
    output_type: str = "pil",
    vae_tiling: bool | None = None,
    prompt_syntax: str = "a1111",
    controls: Sequence[Control] = (),
    hires_scale: float | None = None,
    hires_strength: float = 0.5,
    hires_steps: int | None = None,
    hires_upscaler: str = "latent",
    refiner_switch: float | None = None,
    refines: bool = False,
) -> Request:
    """Check the arguments of a call and fill in the checkpoint's defaults; `Pipeline.__call__` says what they mean.

    Raises:
        FastsdError: something is missing, unknown or out of range; one line that names it.
    """

    def chosen(name: str, value: Any) -> Any:
        return defaults[name] if value is None else value

    config = components.vae.config
    prompts, negatives = texts("prompt", prompt), texts("negative_prompt", negative_prompt)
    if not all(text.strip() for text in prompts):
        raise FastsdError("prompt is empty; say what to draw")
    if len(negatives) not in (1, len(prompts)):
        raise FastsdError(f"negative_prompt holds {len(negatives)} texts for {len(prompts)} prompts; give 1 or as many")
    each = number("num_images_per_prompt", num_images_per_prompt, 1, MAX_IMAGES, whole=True)
    count = number("the number of images", len(prompts) * each, 1, MAX_IMAGES, whole=True)
    first = secrets.randbelow(2**32) if seed is None else number("seed", seed, 0, MAX_SEED - count, whole=True)
    batch_size = number("batch_size", chosen_batch(batch_size, count), 1, MAX_IMAGES, whole=True)
    layers = min(encoder.config.num_hidden_layers for encoder in components.text_encoders)
    if output_type not in OUTPUT_TYPES:
        raise FastsdError(f"output_type is {output_type!r}; it should be one of {', '.join(OUTPUT_TYPES)}")

    steps = number("num_inference_steps", chosen("num_inference_steps", num_inference_steps), 1, MAX_STEPS, whole=True)
    guidance = number("guidance_scale", chosen("guidance_scale", guidance_scale), 0, MAX_GUIDANCE)
    guided = guidance != 1.0 and not components.unet.config.time_cond_proj_dim  # which takes the scale as an input
    negatives = [negatives[i % len(negatives)] for i in range(len(prompts)) for _ in range(each)]
    prompts = [text for text in prompts for _ in range(each)]
    wording = read_wording(components, prompts, negatives, steps, prompt_syntax, guided)
    notes = dict.fromkeys(wording.notes)
    default = (defaults["width"], defaults["height"])
    image, mask, fitted, (width, height), more = fit_pictures(
        components, image, mask_image, listed(controls), width, height, default
    )
    notes |= dict.fromkeys(more)
    if refines:
        refiner_switch = REFINER_SWITCH if refiner_switch is None else number("refiner_switch", refiner_switch, 0, 1)
    elif refiner_switch is not None:
        raise FastsdError("refiner_switch is given and no refiner is loaded; give a refiner to load")
    if latents is not None:
        shape = (count, config.latent_channels, height // config.downscale, width // config.downscale)
        latents = fit_latents(latents, shape)
    weight = components.unet.conv_in.weight
    tiled = width * height > TILED_FROM if vae_tiling is None else bool(vae_tiling)
    batch_size = min(batch_size, count)
    picture = memory.Picture(components.unet.config, config, width, height, batch_size, weight.dtype, tiled)
    memory.check_picture(picture, weight.device)

    strength, eta = number("strength", strength, 0, 1), number("eta", eta, 0, 1)
    if schedule is None and sampler is None:
        schedule = defaults["schedule"]  # belongs to the checkpoint's own sampler
    sampler, schedule = resolve(word("sampler", chosen("sampler", sampler)), word("schedule", schedule or "default"))
    start = 0 if image is None else steps - min(int(steps * strength), steps)
    table = make_table(sampler, steps, components.scheduler, schedule, start, eta)
    if not len(table) and strength > 0:
        notes[nothing_redone("the run", strength, steps)] = None
    notes |= dict.fromkeys(left_out(fitted, table))
    request = Request(
        wording=wording,
        seeds=tuple(first + i for i in range(count)),
        table=table,
        num_inference_steps=steps,
        guidance_scale=guidance,
        guided=guided,
        guidance_rescale=number("guidance_rescale", guidance_rescale, 0, 1),
        width=width,
        height=height,
        sampler=sampler,
        schedule=schedule,
        eta=eta,
        clip_skip=number("clip_skip", clip_skip, 1, layers, whole=True),
        strength=strength,
        batch_size=batch_size,
        output_type=output_type,
        vae_tiling=tiled,
        picture=picture,
        image=image,
        mask=mask,
        latents=latents,
        notes=tuple(notes),
        controls=fitted,
        trained_steps=components.scheduler.num_train_timesteps,
        refiner_switch=refiner_switch,
    )
    if hires_scale is None:
        if hires_steps is not None:
            raise FastsdError("hires_steps is given without hires_scale, which says by how much to enlarge")
        return request
    return with_second_pass(components, request, hires_scale, hires_strength, hires_steps, hires_upscaler)


def with_second_pass(
    components: Components, first: Request, scale: float, strength: float, steps: int | None, upscaler: str
) -> Request:
    """`first` with a second pass, image-to-image over its enlarged result; `Pipeline.__call__` says what they mean."""
    if first.image is not None:
        raise FastsdError("hires_scale is given with image; the second pass belongs to text-to-image")
    if upscaler not in UPSCALERS:
        raise FastsdError(f"hires_upscaler is {upscaler!r}; it should be one of {', '.join(UPSCALERS)}")
    if upscaler != "latent" and components.vae.encoder is None:
        raise FastsdError(f"hires_upscaler: {DECODES_ONLY}")
    scale = number("hires_scale", scale, 1, MAX_HIRES)
    strength = number("hires_strength", strength, 0, 1)
    wording = first.wording
    if steps is None:
        steps = first.num_inference_steps
    else:  # prompts with a schedule are read anew
        steps = number("hires_steps", steps, 1, MAX_STEPS, whole=True)
        prompts, negatives = wording.prompts, wording.negative_prompts
        wording = read_wording(components, prompts, negatives, steps, wording.syntax, first.guided)
    factor = components.vae.config.downscale
    width, height = (max(round(n * scale / factor), 1) * factor for n in (first.width, first.height))
    if max(width, height) > MAX_SIDE:
        raise FastsdError(f"hires_scale: {width}x{height} would be drawn; at most {MAX_SIDE} pixels a side are")
    tiled = first.vae_tiling or width * height > TILED_FROM
    picture = replace(first.picture, width=width, height=height, tiled=tiled)
    memory.check_picture(picture, components.unet.conv_in.weight.device)
    start = steps - min(int(steps * strength), steps)
    table = make_table(first.sampler, steps, components.scheduler, first.schedule, start, first.eta)
    if not len(table) and strength > 0:
        first = replace(first, notes=(*first.notes, nothing_redone("the second drawing", strength, steps)))
    second = replace(
        first,
        wording=wording,
        table=table,
        num_inference_steps=steps,
        width=width,
        height=height,
        strength=strength,
        vae_tiling=tiled,
        picture=picture,
        latents=None,
        controls=tuple(replace(one, image=resized(one.image, width, height)) for one in first.controls),
    )
    return replace(first, hires=second, hires_scale=scale, hires_upscaler=upscaler)


def chosen_batch(batch_size: int | None, count: int) -> int:
    """The images that run together: as asked, else all up to `DEFAULT_BATCH`."""
    return min(count, DEFAULT_BATCH) if batch_size is None else batch_size


def make_table(sampler: str, steps: int, scheduler: SchedulerConfig, schedule: str, start: int, eta: float) -> Table:
    """The sampler's table; one without rows where a low strength leaves no step, so that the picture stays."""
    if start < steps:
        return build(sampler, steps, scheduler, schedule=schedule, start=start, eta=eta)
    table = build(sampler, steps, scheduler, schedule=schedule, start=steps - 1, eta=eta)
    none = {name: getattr(table, name)[:0] for name in ("rows", "save", "push", "draw", "keep", "step")}
    return replace(table, **none, mix=(1.0, 0.0))
