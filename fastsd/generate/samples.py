"""Which UNet samples run for an image in each row of the table, and the scales that combine their outputs."""

from __future__ import annotations

from dataclasses import dataclass

from fastsd.generate.request import Pass

# What a UNet sample reads: the prompt, with self-attentions perturbed; the negative prompt; the same with the image
# that the model edits; the prompt.
PERTURBED, NEGATIVE, IMAGE, POSITIVE = "perturbed", "negative", "image", "positive"
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

    def perturbed(self, scale: float) -> RowSamples:
        """The same with perturbed-attention guidance (Ahn et al. 2024, equation 16).

        With p, u, c the outputs of the perturbed, the negative and the positive sample, u + g (c - u) + s (c - p) is
        p + (g + s) (c - u) + (1 + s) (u - p): the three parts that an image's guidance has. Without u, c + s (c - p) is
        p + (1 + s) (c - p).
        """
        if self.guidance is None:
            return RowSamples((PERTURBED, *self.roles), 1 + scale)
        return RowSamples((PERTURBED, *self.roles), self.guidance + scale, 1 + scale)


def samples_by_row(stage: Pass) -> list[RowSamples]:
    """The samples of every row. Outside the guidance's interval (Kynkäänniemi et al. 2024) nothing but the prompt
    guides; where the perturbed sample's scale is 0, and in the refiner's rows, it is left out.

    stage: of images that have one guidance, see `Pass.of`.
    """
    settings, plain = stage.settings, RowSamples((POSITIVE,))
    guided = RowSamples(
        GUIDED[stage.parts],
        settings.guidance_scale if stage.guided else None,
        settings.image_guidance_scale if stage.parts == 3 else None,
    )
    inside = stage.table.rows_within(settings.guidance_start, settings.guidance_end)
    found = []
    for row, timestep in enumerate(stage.table.timesteps):
        samples = guided if row in inside else plain
        scale = (settings.pag_scale or 0.0) - settings.pag_adaptive_scale * (1000.0 - float(timestep))
        found.append(samples.perturbed(scale) if scale > 0 and row < stage.refiner_row else samples)
    return found
