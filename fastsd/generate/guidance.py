"""The guidance of each image: its scale, and the samples that the UNet runs for it."""

from __future__ import annotations

from typing import NamedTuple

from fastsd.components import Components
from fastsd.errors import FastsdError
from fastsd.generate.beside import IMAGE_GUIDANCE
from fastsd.generate.like import LIKE
from fastsd.model.unet import UNet
from fastsd.parameters import Settings
from fastsd.sampling.table import Table


def count_parts(components: Components, settings: Settings) -> int:
    """How many samples the UNet runs for an image: 1 without guidance, 2, or 3 where text and image both guide.

    Three are an unconditional one, one with the image, one with image and text. As in diffusers'
    StableDiffusionInstructPix2PixPipeline, a guidance of at most 1 or an image guidance below 1 turns both off. Any
    model runs the prompt alone at a guidance of at most 1 (diffusers, `do_classifier_free_guidance`), so the 0.0 on the
    cards of few-step models means what 1 means; other programs mix in the negative prompt there.
    """
    unet = components.unet.config
    if unet.time_cond_proj_dim:
        return 1  # the guidance scale is an input
    if unet.reads == "image":
        return 3 if settings.guidance_scale > 1.0 and settings.image_guidance_scale >= 1.0 else 1
    guidance = settings.guidance_scale
    return 2 if guidance > 1.0 or (LIKE[settings.like].mixes_below_one and guidance < 1.0) else 1


def check_options(components: Components, settings: Settings) -> None:
    """Refuse what the model's UNet cannot do otherwise.

    Raises:
        FastsdError: layers or a branch that it does not have; perturbed-attention guidance of a model that edits; or
            an adaptive scale where noise levels have no timesteps.
    """
    unet, last = components.unet, len(components.unet.skip_channels) - 1
    if settings.pag_scale:
        if unet.config.reads == "image":
            raise FastsdError("not supported for a model that edits: its image guides already", argument="pag_scale")
        perturbed_attentions(unet, settings.pag_layers)
        if settings.pag_adaptive_scale and components.scheduler.edm is not None:
            raise FastsdError("this model's noise levels have no timesteps", argument="pag_adaptive_scale")
    if settings.deepcache_branch > last:
        raise FastsdError(
            f"it should be a whole number from 0 to {last}: the model has {last + 1} skip connections",
            argument="deepcache_branch",
            value=settings.deepcache_branch,
        )


def perturbed_attentions(unet: UNet, layers: str) -> frozenset[int]:
    """The numbers of the self-attentions that are perturbed.

    layers: names of modules, with commas between them.

    Raises:
        FastsdError: one that has no self-attention.
    """
    names = [name.strip() for name in layers.split(",")]
    found = [unet.attentions_in(name) for name in names]
    for name, own in zip(names, found, strict=True):
        if not own:
            raise FastsdError(
                f"no self-attention is in {name!r:.80}; names are as mid, down_blocks.1, up_blocks.0.attentions.1",
                argument="pag_layers",
            )
    return frozenset().union(*found)


class Guidance(NamedTuple):
    """Of one image: its guidance scale, and the samples that the UNet runs for it."""

    scale: float
    parts: int


def guidance_of_images(components: Components, settings: Settings, images: int) -> tuple[Guidance, ...]:
    """One number for all images of a call, or one for each, or one for each prompt.

    Raises:
        FastsdError: as many as neither; an interval of the steps that ends before it starts.
    """
    if settings.guidance_start > settings.guidance_end:
        start, end = settings.guidance_start, settings.guidance_end
        raise FastsdError(f"{start:g} comes after {{guidance_end}}, {end:g}", argument="guidance_start")
    given, each = settings.guidance_scale, settings.num_images_per_prompt
    scales = given if isinstance(given, list) else [given] * images
    if len(scales) == images // each:
        scales = [scale for scale in scales for _ in range(each)]
    if len(scales) != images:
        prompts = images // each
        raise FastsdError(
            f"{len(scales)} number{'s' * (len(scales) > 1)} for {prompts} prompt{'s' * (prompts > 1)} and {images} "
            f"image{'s' * (images > 1)}; give one, or as many",
            argument="guidance_scale",
        )
    return tuple(Guidance(scale, count_parts(components, settings.replace(guidance_scale=scale))) for scale in scales)


def one_or_each(guidance: tuple[Guidance, ...]) -> float | list[float]:
    """The guidance scale as settings state it: one number where all images have the same."""
    scales = [one.scale for one in guidance]
    return scales[0] if len(set(scales)) == 1 else scales


def guidance_notes(settings: Settings, guidance: tuple[Guidance, ...], table: Table) -> list[str]:
    """Notes on what has no effect: of the image's guidance, and of the interval in which guidance acts.

    table: of the first pass.
    """
    notes = [note for one in dict.fromkeys(guidance) for note in _image_notes(settings.image_guidance_scale, *one)]
    start, end = settings.guidance_start, settings.guidance_end
    if (start, end) == (0.0, 1.0):
        return notes
    if all(one.parts == 1 for one in guidance):
        notes.append("guidance_start and guidance_end have no effect: nothing is guided")
    elif len(table) and not table.rows_within(start, end):
        notes.append(f"guidance acts in no step: none of the {table.steps} lies within {start:g} and {end:g}")
    return notes


def _image_notes(image: float | None, scale: float, parts: int) -> list[str]:
    """A note on a guidance that has no effect because the other turns both off."""
    if image is None or parts == 3:
        return []
    if scale > 1.0 > image:
        return [f"guidance is off: the image guidance is {image:g}, and below 1 it turns both off"]
    if image != IMAGE_GUIDANCE and scale <= 1.0:
        return [f"the image guidance has no effect: guidance {scale:g} turns both off"]
    return []
