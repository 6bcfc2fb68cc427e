"""The settings of a call where the caller gives none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastsd.components import Components
from fastsd.config import SchedulerConfig
from fastsd.few_step import Detection, kind_named
from fastsd.weights.adapters.apply import Adapter
from fastsd.weights.few_step import detect_in_adapter

USUAL: dict[str, Any] = {"num_inference_steps": 30, "guidance_scale": 7.5}


@dataclass(frozen=True)
class Defaults:
    """A checkpoint's own settings.

    Attributes:
        components: as they were loaded.
        asked: a kind of few-step model (`fastsd.few_step.KINDS`), or "none"; None: what the files say.
        prediction: the caller's word on what the network predicts, which no kind overrides; or None.

    Raises:
        FastsdError: there is no such kind.
    """

    components: Components
    asked: str | None = None
    prediction: str | None = None

    def __post_init__(self) -> None:
        if self.asked is not None:
            kind_named(self.asked)

    def few_step(self, adapters: Sequence[Adapter] = ()) -> Detection | None:
        """The kind that applies: the one asked for, else an adapter's, else that of the model's files."""
        if self.asked is not None:
            kind = kind_named(self.asked)
            return Detection(kind, "as asked for") if kind is not None else None
        for adapter in adapters:
            detection = detect_in_adapter(adapter.path) if adapter.unet else None
            if detection is not None:
                return detection
        return self.components.few_step

    def scheduler(self, detection: Detection | None) -> SchedulerConfig:
        """The noise schedule and how it is sampled."""
        own = self.components.scheduler
        if detection is None:
            return own
        scheduler = detection.kind.scheduler(own)
        return replace(scheduler, prediction_type=self.prediction or scheduler.prediction_type)

    def settings(self, detection: Detection | None) -> dict[str, Any]:
        """Arguments of a call. The author's recommendation precedes what the files imply."""
        components, scheduler = self.components, self.scheduler(detection)
        side = components.sample_size * components.vae.config.downscale
        settings = USUAL | {"width": side, "height": side}
        settings |= {"sampler": scheduler.sampler, "schedule": scheduler.schedule}
        if detection is None:
            return settings | components.defaults
        guidance_is_input = components.unet.config.time_cond_proj_dim > 0
        few = detection.kind.defaults(scheduler.sampler, side, side, guidance_is_input)
        return settings | (few | components.defaults if detection is components.few_step else components.defaults | few)


def few_step_note(detection: Detection, settings: dict[str, Any]) -> str:
    """A note on the defaults that apply."""
    steps, guidance = settings["num_inference_steps"], settings["guidance_scale"]
    return (
        f"few-step model ({detection.kind.name}, {detection.reason}): by default {steps} step{'s' * (steps > 1)} of "
        f"{settings['sampler']} and guidance {guidance:g}; few_step='none' (--few-step none) treats it as any other"
    )


def steps_from_image(steps: int, strength: Any) -> int:
    """The default number of steps of a few-step model that starts from an image: enough for one of them to run."""
    if isinstance(strength, int | float) and 1 / 1000 <= strength < 1:
        return max(steps, math.ceil(1 / strength))
    return steps
