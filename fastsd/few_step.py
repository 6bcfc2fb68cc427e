"""Models distilled to few steps: the defaults of each kind, as data with its sources.

Such a model gives poor images with the usual settings: guidance is trained into it, and its few timesteps must start at
the last one of training ("trailing"), which is pure noise. What a caller asks for takes precedence.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from fastsd.config import SchedulerConfig
from fastsd.errors import FastsdError

NONE = "none"  # the caller's name for an ordinary model, whatever its files say


@dataclass(frozen=True)
class FewStep:
    """One kind of distillation.

    Attributes:
        samplers: the first is its own; the others stay where a checkpoint with this spacing names them.
        spacing: of the timesteps; None where the sampler decides.
        steps: the number that its authors show first.
        guidance: 1 is off. guidance_as_input: for networks that take the scale as an input.
        prediction: what the network predicts, where that differs from its base model.
        pixels: the side that it was trained at, where that is less than its base model's.
        source: the paper, and where the settings are published.
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
        """The checkpoint's schedule with this kind's sampler and spacing."""
        spacing = self.spacing or config.timestep_spacing
        own = config.timestep_spacing == spacing and config.sampler in self.samplers
        return replace(
            config,
            sampler=config.sampler if own else self.samplers[0],
            schedule=config.schedule if own else "default",
            timestep_spacing=spacing,
            prediction_type=self.prediction or config.prediction_type,
        )

    def defaults(self, sampler: str, width: int, height: int, guidance_is_input: bool) -> dict[str, Any]:
        """Settings of `Pipeline.__call__`. sampler, width, height: the model's own."""
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
    steps=4,  # published for 2, 4 and 8: each file wants its own number
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
            samplers=("euler_a", "euler"),  # sdxl-turbo's folder says the first, sd-turbo's the second
            spacing="trailing",
            steps=1,
            pixels=512,
            source="Sauer et al. 2023, Adversarial Diffusion Distillation (arXiv 2311.17042); model cards and "
            "scheduler_config.json of stabilityai/sdxl-turbo and stabilityai/sd-turbo",
        ),
        _LIGHTNING,
        replace(_LIGHTNING, name="lightning-1", steps=1, prediction="sample"),  # the one-step file gives the image
        FewStep(
            "hyper",
            samplers=("ddim",),
            spacing="trailing",
            steps=4,  # published for 2, 4 and 8: each file wants its own number
            source="Ren et al. 2024, Hyper-SD (arXiv 2404.13686); model card of ByteDance/Hyper-SD, whose files for N "
            "steps take DDIM; TCD, which it names for the file of any number of steps, is not needed for them",
        ),
    )
}


@dataclass(frozen=True)
class Detection:
    """A kind, and why a model or an adapter is of it."""

    kind: FewStep
    why: str


def kind_named(name: str) -> FewStep | None:
    """The kind of that name; None for "none".

    Raises:
        FastsdError: there is no such kind.
    """
    if name != NONE and name not in KINDS:
        raise FastsdError(f"it should be one of {', '.join((*KINDS, NONE))}", argument="few_step", value=name)
    return KINDS.get(name)
