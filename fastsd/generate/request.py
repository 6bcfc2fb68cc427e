"""A call as a plan: every argument checked, every default filled in, everything worked out that needs no network."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image

from fastsd.components import Components
from fastsd.config import SchedulerConfig
from fastsd.errors import FastsdError, about
from fastsd.generate.beside import fill_editing
from fastsd.generate.control import Control, idle_controls, resize_control
from fastsd.generate.defaults import steps_from_image
from fastsd.generate.guidance import Guidance, check_options, guidance_notes, guidance_of_images, one_or_each
from fastsd.generate.habits import without_habits
from fastsd.generate.image_prompts import FittedPrompt
from fastsd.generate.inputs import (
    Images,
    fit_generators,
    fit_images,
    fit_latents,
    moved_generators,
    size_notes,
)
from fastsd.generate.like import LIKE, Rules, fill, rules_notes
from fastsd.generate.masks import InpaintMask
from fastsd.generate.noise import SOURCES, NoisePlan, check_place, fill_subseed, of_image
from fastsd.generate.prompts import Prompts, parse, read_prompts
from fastsd.generate.tables import listed_steps, make_table, refiner_row
from fastsd.model.taesd import DECODES_ONLY
from fastsd.parameters import PARAMETERS, Settings, check_call, check_seeds
from fastsd.parameters.kinds import MAX_SIDE, RANDOM_SEED
from fastsd.parameters.passes import LATENT_UPSCALERS, REFINER_SWITCH
from fastsd.parameters.rows import DEFAULT_BATCH
from fastsd.runtime import memory
from fastsd.sampling.build import spacing_counts
from fastsd.sampling.samplers import UNFOLLOWED, complete, resolve
from fastsd.sampling.table import Table
from fastsd.text.parse import ParsedPrompts

TILED_FROM = 2048 * 2048  # pixels above which the autoencoder works in tiles by default


@dataclass(frozen=True)
class Pass:
    """One walk through the noise levels: the only one, or one of the hires fix's two.

    Attributes:
        settings: of the call, complete. Where images have guidance scales of their own, those of `guidance` count.
        texts: of the images, as they were given.
        prompts: the same, parsed for the steps of this pass.
        table: the sampler's, for the steps that run.
        width, height: in pixels.
        strength: how much of an image it changes.
        vae_tiling: the autoencoder works in tiles.
        guidance: of each image.
        parts: samples that the UNet runs for an image, see `fastsd.generate.guidance.count_parts`; the most of any.
        workload: what its memory depends on.
        controls: with RGB images, width x height.
        image_prompts: those that the UNet reads.
        refiner_row: the first row of the table that the refiner does; without one, past the last.
        image: RGB, width x height, or None.
        mask: of the image, or None.
        depth: a depth map of floating-point pixels, of any size, or None.
        latents: starting noise `[N, C, h, w]`, or None.
        noise: of all images of the call.
        rules: of the program that the call follows.
    """

    settings: Settings
    texts: Prompts
    prompts: ParsedPrompts
    table: Table
    width: int
    height: int
    strength: float
    vae_tiling: bool
    guidance: tuple[Guidance, ...]
    parts: int
    workload: memory.Workload
    controls: tuple[Control, ...]
    image_prompts: tuple[FittedPrompt, ...]
    refiner_row: int
    image: Image.Image | None = None
    mask: InpaintMask | None = None
    depth: Image.Image | None = None
    latents: torch.Tensor | None = None
    noise: NoisePlan = NoisePlan("cpu", ())
    rules: Rules = LIKE["none"]

    @property
    def guided(self) -> bool:
        """An unconditional sample runs beside the conditional one."""
        return self.parts > 1

    def of(self, which: slice) -> Pass:
        """The same pass with the guidance of these images, which is the same for all of them."""
        own = self.guidance[which.start]
        return replace(self, settings=self.settings.replace(guidance_scale=own.scale), parts=own.parts)

    @property
    def unchanged(self) -> Image.Image | None:
        """The image that comes back as it is, since no step runs; None where one runs, or without an image."""
        if len(self.table) or self.image is None:
            return None
        return self.image if self.mask is None else self.mask.original

    @property
    def starts_from_noise(self) -> bool:
        """It paints under a mask, and at full strength the rules leave nothing of the image at the start."""
        return self.mask is not None and self.strength == 1.0 and self.rules.pure_noise_at_full

    def ends_step(self, row: int) -> bool:
        """Whether `row` is the last of one of the user's steps."""
        steps = self.table.step
        return row + 1 == len(steps) or bool(steps[row + 1] != steps[row])


@dataclass(frozen=True)
class Request:
    """One call, complete and in range.

    Attributes:
        settings: a value for every parameter.
        own: of each image, the settings that it has for itself, its seed among them.
        passes: one, or two with the hires fix.
        notes: what the user should know.
    """

    settings: Settings
    own: tuple[dict[str, Any], ...]
    passes: tuple[Pass, ...]
    notes: tuple[str, ...]

    @property
    def batches(self) -> list[slice]:
        """The images that run together: up to `batch_size` neighbours of one guidance scale, whose texts fill as many
        chunks in every pass."""
        shapes = [self.passes[0].guidance, *(stage.prompts.lengths for stage in self.passes)]
        kinds = list(zip(*shapes, strict=True))
        found, start = [], 0
        for i in range(1, len(kinds) + 1):
            differs = i == len(kinds) or kinds[i] != kinds[start]
            if differs or i - start == self.settings.batch_size:
                found.append(slice(start, i))
                start = i
        return found

    @property
    def total_steps(self) -> int:
        """Steps of all batches and passes."""
        return len(self.batches) * sum(stage.table.steps for stage in self.passes)


def plan(
    components: Components,
    defaults: dict[str, Any],
    arguments: dict[str, Any],
    has_refiner: bool = False,
    few_step: bool = False,
) -> Request:
    """Check the arguments of a call, fill in the defaults, and work out what needs no network.

    Args:
        components: the checkpoint.
        defaults: its own settings.
        arguments: of `Pipeline.__call__`.
        has_refiner: another checkpoint does the last steps.
        few_step: the checkpoint was distilled to few steps.

    Raises:
        FastsdError: something is missing, unknown or out of range; it names the argument.
    """
    arguments = without_habits(arguments)
    settings = check_call(arguments, ("refiner",) if has_refiner else ())
    if has_refiner and settings.refiner_switch is None:
        settings = settings.replace(refiner_switch=REFINER_SWITCH)
    settings = fill(settings, {name for name, value in arguments.items() if value is not None})
    settings = _fill_steps(settings, defaults, few_step)
    settings = _fill_sampling(settings, components, defaults)
    settings, notes = fill_editing(settings, components, arguments)
    texts = read_prompts(components, settings, has_refiner)
    count = len(texts)
    settings = _fill_counts(settings, count)
    check_options(components, settings)
    guidance = guidance_of_images(components, settings, count)
    settings = settings.replace(guidance_scale=one_or_each(guidance))
    guided = [one.parts > 1 for one in guidance]
    parsed = parse(components, settings, texts, settings.num_inference_steps, guided)
    images = fit_images(components, settings, (defaults["width"], defaults["height"]))
    settings = settings.replace(width=images.size[0], height=images.size[1])
    first = _first_pass(components, settings, texts, parsed, images, guidance)
    notes += [*rules_notes(settings), *moved_generators(settings), *size_notes(components, settings)]
    notes += [
        *guidance_notes(settings, guidance, first.table),
        *parsed.notes,
        *texts.notes(settings, any(guided)),
        *images.notes,
    ]
    notes += _unfollowed(components.scheduler, settings.sampler)
    if not len(first.table) and first.strength > 0:
        notes.append(_nothing_changes("the run", first.strength, settings.num_inference_steps))
    notes += idle_controls(first.controls, first.table, first.refiner_row)
    passes: tuple[Pass, ...] = (first,)
    if settings.hires_scale is not None:
        second = _second_pass(components, first)
        if not len(second.table) and second.strength > 0:
            steps = settings.hires_steps or settings.num_inference_steps
            notes.append(_nothing_changes("the second pass", second.strength, steps))
        passes = (first, second)
    own = tuple(of_image(settings, i, count) for i in range(count))
    if isinstance(settings.guidance_scale, list):
        own = tuple(one | {"guidance_scale": scale} for one, (scale, _) in zip(own, guidance, strict=True))
    return Request(settings, own, passes, tuple(dict.fromkeys(notes)))


def _fill_steps(settings: Settings, defaults: dict[str, Any], few_step: bool) -> Settings:
    """Steps and guidance. A few-step model that starts from an image gets steps enough for one of them to run."""

    def enough(steps: int, strength: float) -> int:
        return steps_from_image(steps, strength) if few_step and listed is None else steps

    listed = listed_steps(settings)
    steps = listed or settings.num_inference_steps
    if steps is None:
        steps = PARAMETERS["num_inference_steps"].check(defaults["num_inference_steps"])
        if settings.image is not None:
            steps = enough(steps, settings.strength)
    guidance = settings.guidance_scale
    if guidance is None:
        guidance = PARAMETERS["guidance_scale"].check(defaults["guidance_scale"])
    hires_steps = settings.hires_steps
    if hires_steps is None and LIKE[settings.like].fills_hires_steps:
        hires_steps = enough(steps, settings.hires_strength)
    return settings.replace(num_inference_steps=steps, guidance_scale=guidance, hires_steps=hires_steps)


def _fill_sampling(settings: Settings, components: Components, defaults: dict[str, Any]) -> Settings:
    """Sampler and schedule by their names, and the spacing. The checkpoint's schedule belongs to its own sampler."""
    layers = min(encoder.config.num_hidden_layers for encoder in components.text_encoders)
    if settings.clip_skip > layers:
        raise FastsdError(
            f"it should be a whole number from 1 to {layers}", argument="clip_skip", value=settings.clip_skip
        )
    own = settings.sampler is None
    rules, listed = LIKE[settings.like], listed_steps(settings) is not None
    schedule = settings.schedule or (defaults["schedule"] if own and not listed else "default")
    sampler, schedule = resolve(defaults["sampler"] if own else settings.sampler, schedule)
    sampler = rules.samplers.get(sampler, sampler)
    if listed:
        return settings.replace(sampler=sampler, schedule="default")
    if settings.schedule is None and schedule == "default":
        schedule = rules.schedules.get(sampler, schedule)
    spacing = settings.spacing
    if spacing is None and rules.levels is not None and rules.follows(sampler):
        spacing = rules.levels.spacing(sampler) if spacing_counts(sampler, schedule, components.scheduler) else None
    if spacing_counts(sampler, schedule, components.scheduler):
        spacing = complete(components.scheduler, sampler, spacing).timestep_spacing
    elif spacing is not None:
        raise FastsdError(
            f"{sampler} on the {schedule} schedule has timesteps of its own; leave the spacing out", argument="spacing"
        )
    return settings.replace(sampler=sampler, schedule=schedule, spacing=spacing)


def _unfollowed(scheduler: SchedulerConfig, sampler: str) -> list[str]:
    """A note on each setting of the checkpoint's scheduler file that the sampler does not follow."""
    return [
        f"the model's scheduler file asks for {UNFOLLOWED[key].meaning} ({key}); {sampler} runs without"
        for key in scheduler.unfollowed
        if sampler in UNFOLLOWED[key].samplers
    ]


def _fill_counts(settings: Settings, count: int) -> Settings:
    """The seed, or what stands for it, and the batch size of `count` images."""
    batch_size = min(settings.batch_size or DEFAULT_BATCH, count)
    if settings.generator is not None:
        settings = settings.replace(**fit_generators(settings, count))
    else:
        seed = secrets.randbelow(2**32) if settings.seed in (None, RANDOM_SEED) else settings.seed
        check_seeds(seed, 1 if SOURCES[settings.noise].batched else count)
        settings = settings.replace(seed=seed)
    settings = settings.replace(subseed=fill_subseed(settings.subseed, settings.subseed_strength))
    check_place(settings)
    return settings.replace(batch_size=batch_size)


def _first_pass(
    components: Components,
    settings: Settings,
    texts: Prompts,
    prompts: ParsedPrompts,
    images: Images,
    guidance: tuple[Guidance, ...],
) -> Pass:
    config, count, parts = components.vae.config, len(texts), max(one.parts for one in guidance)
    width, height = images.size
    latents = settings.latents
    if latents is not None:
        shape = (count, config.latent_channels, height // config.downscale, width // config.downscale)
        latents = fit_latents(latents, shape)
    weight = components.unet.conv_in.weight
    tiled = width * height > TILED_FROM if settings.vae_tiling is None else settings.vae_tiling
    workload = memory.Workload(
        components.unet.config,
        config,
        width,
        height,
        settings.batch_size,
        weight.dtype,
        tiled,
        max(parts, 2) + bool(settings.pag_scale),
        next(components.vae.parameters()).dtype,
    )
    memory.check_workload(workload, weight.device)
    strength = 1.0 if images.image is None else settings.strength
    rules, steps = LIKE[settings.like], settings.num_inference_steps
    total, run = (steps, steps) if images.image is None else rules.steps(steps, strength)
    table = make_table(settings, components.scheduler, total, run, components.xl)
    return Pass(
        settings=settings,
        texts=texts,
        prompts=prompts,
        table=table,
        width=width,
        height=height,
        strength=strength,
        vae_tiling=tiled,
        guidance=guidance,
        parts=parts,
        workload=workload,
        controls=images.controls,
        image_prompts=images.image_prompts,
        refiner_row=refiner_row(table, components.scheduler, settings.refiner_switch),
        image=images.image,
        mask=images.mask,
        depth=images.depth,
        latents=latents,
        noise=NoisePlan.of(settings, count, rules.from_mean),
        rules=rules,
    )


def _second_pass(components: Components, first: Pass) -> Pass:
    """The hires fix: image-to-image over the enlarged result of the first pass."""
    settings, weight = first.settings, components.unet.conv_in.weight
    if settings.hires_upscaler not in LATENT_UPSCALERS and components.vae.encoder is None:
        raise FastsdError(DECODES_ONLY, argument="hires_upscaler")
    steps, strength = settings.hires_steps or settings.num_inference_steps, settings.hires_strength
    parsed = first.prompts
    if first.rules.counts_calls or steps != settings.num_inference_steps:  # schedules in prompts count steps
        before = settings.num_inference_steps
        guided = [one.parts > 1 for one in first.guidance]
        parsed = parse(components, settings, first.texts, steps, guided, before)
    factor = components.vae.config.downscale
    width, height = (max(round(n * settings.hires_scale / factor), 1) * factor for n in (first.width, first.height))
    if max(width, height) > MAX_SIDE:
        raise FastsdError(
            f"it makes {width}x{height}; at most {MAX_SIDE} pixels a side are generated",
            argument="hires_scale",
            value=settings.hires_scale,
        )
    tiled = first.vae_tiling or width * height > TILED_FROM
    workload = replace(first.workload, width=width, height=height, tiled=tiled)
    memory.check_workload(workload, weight.device)
    if not isinstance(settings.hires_upscaler, str):
        with about("hires_upscaler"):
            settings.hires_upscaler.check_memory((first.width, first.height), size=(width, height))
    total, run = first.rules.hires_steps(settings.hires_steps, settings.num_inference_steps, strength)
    table = make_table(settings, components.scheduler, total, run, components.xl)
    return replace(
        first,
        prompts=parsed,
        table=table,
        width=width,
        height=height,
        strength=strength,
        vae_tiling=tiled,
        workload=workload,
        latents=None,
        controls=tuple(resize_control(control, width, height) for control in first.controls),
        refiner_row=refiner_row(table, components.scheduler, settings.refiner_switch),
    )


def _nothing_changes(what: str, strength: float, steps: int) -> str:
    """A note on a strength that leaves no step."""
    return f"{what} changes nothing: strength {strength:g} of {steps} step{'s' * (steps > 1)} is less than one"
