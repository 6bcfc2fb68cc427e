"""What people report of the Python call: habits from diffusers, and what other code in the process has set."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.pipelines import MASK, PHOTO, latents, tiny_pipeline

HIRES = {"hires_scale": 1.5, "hires_strength": 0.7}
MODES: dict[str, dict[str, Any]] = {
    "text": {},
    "image": {"image": PHOTO, "strength": 0.7},
    "mask": {"image": PHOTO, "mask_image": MASK, "strength": 0.7},
    "hires": HIRES,
    "rescaled": {"guidance_rescale": 0.7},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("guidance", [0, 0.5])
def test_guidance_0_follows_the_prompt(guidance: float, mode: str) -> None:
    """At most 1 is no guidance: diffusers' `do_classifier_free_guidance` in pipeline_stable_diffusion.py is
    `guidance_scale > 1`, and the model cards of SD-Turbo and SDXL-Turbo say 0.0."""
    pipe = tiny_pipeline()
    expected = latents(pipe, guidance_scale=1, **MODES[mode])
    torch.testing.assert_close(latents(pipe, guidance_scale=guidance, **MODES[mode]), expected, rtol=0, atol=0)
    result = pipe("a cat", seed=1, guidance_scale=guidance, negative_prompt="fog", **MODES[mode])
    assert result.parameters["guidance_scale"] == guidance
    assert any("negative prompt has no effect" in note for note in result.notes)


@pytest.mark.parametrize("like", ["a1111", "comfy"])
def test_guidance_below_1_mixes_where_a1111_and_comfyui_do(like: str) -> None:
    """A1111's `combine_denoised` is uncond + scale (cond - uncond) at any scale; ComfyUI's `cfg_function` too. At 0 it
    is the negative prompt alone."""
    pipe = tiny_pipeline()
    swapped = latents(pipe, "fog", negative_prompt="a cat", guidance_scale=0, like=like)
    torch.testing.assert_close(swapped, latents(pipe, "a cat", guidance_scale=1, like=like), rtol=0, atol=1e-4)
    assert not torch.equal(swapped, latents(pipe, "fog", guidance_scale=1, like=like))


def test_guidance_0_with_a_controlnet_follows_the_prompt() -> None:
    """As without one."""
    import fastsd
    from fastsd.config import ControlNetConfig
    from fastsd.model.controlnet import ControlNet

    pipe = tiny_pipeline()
    torch.manual_seed(3)
    net = ControlNet(ControlNetConfig(pipe.components.unet.config, (8, 8, 8, 8)))
    controls = [fastsd.Control(net, PHOTO)]
    expected = latents(pipe, guidance_scale=1, controls=controls)
    assert torch.equal(latents(pipe, guidance_scale=0, controls=controls), expected)
