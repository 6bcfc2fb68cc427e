"""Features that diffusers' `encode_prompt` makes give the latents that they give there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastsd.pipeline import Pipeline
from tests.support.families import TOLERANCE, generator
from tests.support.matching import relative_error


@pytest.mark.parametrize("negative", ["fog", None])
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_features_in_place_of_prompts(families: Any, family: str, negative: str | None) -> None:
    """Without features of a negative prompt: an encoded empty text in SD 1 and 2, zeros in SDXL."""
    theirs = families.pipelines[family]
    ours = Pipeline.from_pretrained(families.folder / family, device="cpu", dtype="fp32")
    names = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
    with torch.no_grad():
        found = theirs.encode_prompt(
            prompt=["a cat", "a dog on a mat"],
            device=torch.device("cpu"),
            num_images_per_prompt=1,
            do_classifier_free_guidance=True,
            negative_prompt=None if negative is None else [negative] * 2,
        )
    given = dict(zip(names, found, strict=False))
    if negative is None:
        given = {name: x for name, x in given.items() if not name.startswith("negative")}
    same: dict[str, Any] = given | {"num_inference_steps": 4, "guidance_scale": 5.0, "width": 64, "height": 64}
    same |= {"num_images_per_prompt": 2, "output_type": "latent"}
    generators = [one for seed in (3, 4, 5, 6) for one in generator(seed)]
    expected = theirs(**same, generator=generators).images
    found = ours(**same, seed=3).images
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) < TOLERANCE
