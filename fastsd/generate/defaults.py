"""The settings that a call of the pipeline has where the caller gives none."""

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
    """What a checkpoint's own settings come from.

    Attributes:
        components: as they were loaded.
        asked: a kind of few-step model (`fastsd.few_step.KINDS`), or "none"; None: what the files say.
        prediction: what the caller said that the network predicts; no kind changes it.

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
        """The kind in force: the one asked for, else what an adapter says, else what the model's files say."""
        if self.asked is not None:
            kind = kind_named(self.asked)
            return Detection(kind, "as asked for") if kind is not None else None
        for adapter in adapters:
            said = detect_in_adapter(adapter.path) if adapter.unet else None
            if said is not None:
                return said
        return self.components.few_step

    def scheduler(self, said: Detection | None) -> SchedulerConfig:
        """The noise schedule and how it is sampled."""
        own = self.components.scheduler
        if said is None:
            return own
        scheduler = said.kind.scheduler(own)
        return replace(scheduler, prediction_type=self.prediction or scheduler.prediction_type)

    def settings(self, said: Detection | None) -> dict[str, Any]:
        """Arguments of a call. What a checkpoint's author recommends comes before what its own files imply."""
        components, scheduler = self.components, self.scheduler(said)
        side = components.sample_size * components.vae.config.downscale
        settings = USUAL | {"width": side, "height": side}
        settings |= {"sampler": scheduler.sampler, "schedule": scheduler.schedule}
        if said is None:
            return settings | components.defaults
        guidance_is_input = components.unet.config.time_cond_proj_dim > 0
        few = said.kind.defaults(scheduler.sampler, side, side, guidance_is_input)
        return settings | (few | components.defaults if said is components.few_step else components.defaults | few)


def few_step_note(said: Detection, settings: dict[str, Any]) -> str:
    """What the user should know of the defaults in force."""
    steps, guidance = settings["num_inference_steps"], settings["guidance_scale"]
    return (
        f"few-step model ({said.kind.name}, {said.why}): {steps} step{'s' * (steps > 1)} of {settings['sampler']} and "
        f"guidance {guidance:g} where not asked otherwise; few_step='none' (--few-step none) takes it as any other"
    )


def steps_from_image(steps: int, strength: Any) -> int:
    """The default number of steps of a few-step model that starts from a picture: enough that one of them runs."""
    if isinstance(strength, int | float) and 1 / 1000 <= strength < 1:
        return max(steps, math.ceil(1 / strength))
    return steps
