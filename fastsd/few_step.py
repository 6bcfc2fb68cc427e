"""Models distilled to few steps: the default settings of each kind, as data with sources.

Such a model makes poor images with the usual settings: guidance is trained into it, and its few timesteps must start at
the last of training ("trailing"), where the input is all noise. Whatever the caller chooses takes precedence.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from fastsd.config import SchedulerConfig
from fastsd.errors import FastsdError

NONE = "none"  # the caller's choice to treat a model as any other, whatever its files say


@dataclass(frozen=True)
class FewStep:
    """One kind of distillation.

    Attributes:
        name: what callers and metadata call it.
        samplers: the kind's own first; a checkpoint with this spacing that names one of the others keeps it.
        spacing: of the timesteps; None: the checkpoint's.
        steps: the authors' first choice.
        source: the paper, and where the settings are published.
        guidance: the guidance scale; 1 is off.
        guidance_as_input: the scale for networks that take it as an input.
        prediction: what the network predicts, where that differs from the base model's.
        pixels: the side of its training images, where that is less than the base model's.
    """

    name: str
    samplers: tuple[str, ...]
    spacing: str | None
    steps: int
    source: str
    guidance: float = 1.0
    guidance_as_input: float | None = None
    prediction: str | None = None
    pixels: int | None = None

    def scheduler(self, config: SchedulerConfig) -> SchedulerConfig:
        """The checkpoint's noise schedule with this kind's sampler, spacing and prediction."""
        spacing = self.spacing or config.timestep_spacing
        keeps_sampler = config.timestep_spacing == spacing and config.sampler in self.samplers
        return replace(
            config,
            sampler=config.sampler if keeps_sampler else self.samplers[0],
            schedule=config.schedule if keeps_sampler else "default",
            timestep_spacing=spacing,
            prediction_type=self.prediction or config.prediction_type,
        )

    def defaults(self, sampler: str, width: int, height: int, guidance_is_input: bool) -> dict[str, Any]:
        """Settings of `Pipeline.__call__`.

        Args:
            sampler: of `scheduler`.
            width, height: the base model's.
            guidance_is_input: the network takes the guidance scale as an input.
        """
        as_input = self.guidance_as_input if guidance_is_input else None
        return {
            "num_inference_steps": self.steps,
            "guidance_scale": as_input or self.guidance,
            "sampler": sampler,
            "width": min(width, self.pixels or width),
            "height": min(height, self.pixels or height),
        }


_LIGHTNING = FewStep(
    "lightning",
    samplers=("euler",),
    spacing="trailing",
    steps=4,  # published for 2, 4 and 8: each file needs its own number
    source="Lin, Wang and Yang 2024, SDXL-Lightning (arXiv 2402.13929); model card of ByteDance/SDXL-Lightning",
)
KINDS: dict[str, FewStep] = {
    kind.name: kind
    for kind in (
        FewStep(
            "lcm",
            samplers=("lcm",),
            spacing=None,
            steps=4,
            guidance_as_input=8.0,
            source="Luo et al. 2023, Latent Consistency Models (arXiv 2310.04378), LCM-LoRA (arXiv 2311.05556); model "
            "cards of SimianLuo/LCM_Dreamshaper_v7 and latent-consistency/lcm-lora-sdv1-5",
        ),
        FewStep(
            "turbo",
            samplers=("euler_a", "euler"),  # as in the folders of sdxl-turbo and sd-turbo
            spacing="trailing",
            steps=1,
            pixels=512,
            source="Sauer et al. 2023, Adversarial Diffusion Distillation (arXiv 2311.17042); model cards and "
            "scheduler_config.json of stabilityai/sdxl-turbo and stabilityai/sd-turbo",
        ),
        _LIGHTNING,
        replace(_LIGHTNING, name="lightning-1", steps=1, prediction="sample"),  # the one-step file predicts the image
        FewStep(
            "hyper",
            samplers=("ddim",),
            spacing="trailing",
            steps=4,  # published for 2, 4 and 8: each file needs its own number
            source="Ren et al. 2024, Hyper-SD (arXiv 2404.13686); model card of ByteDance/Hyper-SD, which names DDIM "
            "for its files of N steps, and TCD only for the file of any number of steps",
        ),
    )
}


@dataclass(frozen=True)
class Detection:
    """The kind of a model or an adapter, and how it was recognised.

    Attributes:
        kind: one of `KINDS`.
        reason: for messages: "its scheduler is LCM's".
    """

    kind: FewStep
    reason: str


def kind_named(name: str) -> FewStep | None:
    """The kind of that name; None for "none".

    Raises:
        FastsdError: there is no such kind.
    """
    if name != NONE and name not in KINDS:
        raise FastsdError(f"it should be one of {', '.join((*KINDS, NONE))}", argument="few_step", value=name)
    return KINDS.get(name)
