"""Which UNet samples run for an image in each row of the table, and the scales that combine their outputs."""

from __future__ import annotations

from dataclasses import dataclass

from fastsd.generate.request import Pass

# What a UNet sample reads: the negative prompt; the same with the image that the model edits; the prompt.
NEGATIVE, IMAGE, POSITIVE = "negative", "image", "positive"
GUIDED = {1: (POSITIVE,), 2: (NEGATIVE, POSITIVE), 3: (NEGATIVE, IMAGE, POSITIVE)}


@dataclass(frozen=True)
class RowSamples:
    """The UNet samples of each image in one row.

    Attributes:
        roles: what each of them reads, in the order of `fastsd.kernels.advance.guided`.
        guidance, image_guidance: the scales there; None where there are fewer samples.
    """

    roles: tuple[str, ...]
    guidance: float | None = None
    image_guidance: float | None = None


def samples_by_row(stage: Pass) -> list[RowSamples]:
    """The samples of every row; outside the guidance's interval (Kynkäänniemi et al. 2024) the prompt's alone.

    stage: of images that have one guidance, see `Pass.of`.
    """
    settings, plain = stage.settings, RowSamples((POSITIVE,))
    guided = RowSamples(
        GUIDED[stage.parts],
        settings.guidance_scale if stage.guided else None,
        settings.image_guidance_scale if stage.parts == 3 else None,
    )
    inside = stage.table.rows_within(settings.guidance_start, settings.guidance_end)
    return [guided if row in inside else plain for row in range(len(stage.table))]
