"""Guidance in an interval of the steps agrees with diffusers, whose callbacks switch it on and off."""

from __future__ import annotations

from typing import Any

import torch

from fastsd.pipeline import Pipeline
from tests.support.families import TOLERANCE, Families, generator, latents_of
from tests.support.matching import relative_error

PROMPT, NEGATIVE = "a cat on a mat", "blue"
SETTINGS: dict[str, Any] = {"num_inference_steps": 5, "width": 64, "height": 64}


def test_an_interval(families: Families) -> None:
    """diffusers has no interval; its callbacks change the scale and the texts between two steps."""
    theirs = families.pipelines["sd1"]
    positive, negative = theirs.encode_prompt(PROMPT, "cpu", 1, True, NEGATIVE)

    def after(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        guided = 1 <= step + 1 < 4
        pipe._guidance_scale = 4.0 if guided else 1.0
        return {"prompt_embeds": torch.cat([negative, positive]) if guided else positive}

    expected = latents_of(
        theirs,
        None,
        prompt_embeds=positive,
        guidance_scale=1.0,
        callback_on_step_end=after,
        callback_on_step_end_tensor_inputs=["prompt_embeds"],
        generator=generator(3),
        **SETTINGS,
    )
    own = Pipeline.from_pretrained(families.folder / "sd1", device="cpu", dtype="fp32")
    arguments = SETTINGS | {"negative_prompt": NEGATIVE, "guidance_scale": 4.0, "seed": 3}
    found = latents_of(own, PROMPT, guidance_start=0.2, guidance_end=0.8, **arguments)
    assert relative_error(found, expected) < TOLERANCE
    assert relative_error(latents_of(own, PROMPT, **arguments), expected) > 100 * TOLERANCE
