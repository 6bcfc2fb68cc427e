"""From the arguments of a call to an order: the same checks and defaults for every API."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastsd.errors import FastsdError
from fastsd.parameters import check_call
from fastsd.parameters.kinds import RANDOM_SEED
from fastsd.sampling.samplers import resolve
from fastsd.server.catalogue import Catalogue, Listed
from fastsd.server.jobs import ControlChoice, ImagePromptChoice, Order, UpscalerChoice
from fastsd.server.limits import Limits
from fastsd.text.syntax import take_loras


@dataclass
class Draft:
    """A request while it is translated.

    Attributes:
        arguments: of `fastsd.Pipeline.__call__`.
        notes: what the client should know.
        model, refiner: as listed; None: the server's current one, none.
        upscaler: of the hires fix; None: what the arguments say.
    """

    arguments: dict[str, Any] = field(default_factory=dict)
    controls: list[ControlChoice] = field(default_factory=list)
    image_prompts: list[ImagePromptChoice] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    model: Listed | None = None
    refiner: Listed | None = None
    upscaler: UpscalerChoice | None = None
    previews: tuple[float, ...] = ()


def make_order(draft: Draft, api: str, current: Listed, catalogue: Catalogue, limits: Limits) -> Order:
    """The order that a request stands for. Seeds that are left to chance are drawn here.

    Raises:
        FastsdError: an argument that is wrong whatever the model.
    """
    given = {name: value for name, value in draft.arguments.items() if value is not None}
    files = {"refiner": draft.refiner, "hires_upscaler": draft.upscaler}
    check_call(given, [name for name, file in files.items() if file is not None])
    if "sampler" in given or "schedule" in given:
        names = resolve(given.get("sampler", "euler"), given.get("schedule", "default"))
        given |= {name: value for name, value in zip(("sampler", "schedule"), names, strict=True) if name in given}
    for name in ("seed", "subseed"):
        if given.get(name, RANDOM_SEED if name == "seed" else 0) == RANDOM_SEED:
            given[name] = secrets.randbelow(2**32)
    for name in ("prompt", "negative_prompt"):
        try:
            (given.get(name) or "").encode()
        except UnicodeEncodeError:
            raise FastsdError("the text is not valid UTF-8", argument=name) from None
    limits.check(given)
    return Order(
        model=catalogue.choice(draft.model or current, draft.refiner),
        arguments=given,
        controls=tuple(draft.controls),
        api=api,
        loras=_loras(given, catalogue),
        previews=draft.previews,
        facts=draft.facts,
        image_prompts=tuple(draft.image_prompts),
        upscaler=draft.upscaler,
    )


def _loras(arguments: Mapping[str, Any], catalogue: Catalogue) -> tuple[tuple[str, float, float], ...]:
    """The LoRAs that the prompt's tags name."""
    if arguments.get("prompt_syntax") == "plain":
        return ()
    tags = take_loras(arguments.get("prompt") or "")[1]
    if tags and catalogue.settings.lora_dir is None:
        raise FastsdError(
            f"<lora:{tags[0].name}>: this server was started without a folder of LoRAs", argument="prompt"
        )
    return tuple((tag.name, tag.unet, tag.text) for tag in tags)
