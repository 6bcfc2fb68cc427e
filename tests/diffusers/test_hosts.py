"""Kinds of diffusers' own pipeline tests that the files beside do not have: before and after `accelerate` alike.

docs/diffusers.md has the counts of a run of those tests themselves.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import fastsd
from tests.support.families import Families
from tests.support.hosts import PHOTO, TOLERANCE, accelerated, make, networks, pixels

OWN = " runs in diffusers' own code: "


@pytest.fixture
def pipe(families: Families) -> Iterator[Any]:
    """With networks of its own."""
    pipe = make(families, "StableDiffusionPipeline")
    for name, network in networks(pipe).items():
        setattr(pipe, name, copy.deepcopy(network))
    yield pipe


def fused(pipe: Any) -> list[torch.Tensor]:
    pipe.fuse_qkv_projections()
    first = pixels(pipe)
    pipe.unfuse_qkv_projections()
    return [first, pixels(pipe)]


def stored_in_fp8(pipe: Any) -> list[torch.Tensor]:
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    return [pixels(pipe)]


def interrupted(pipe: Any) -> list[torch.Tensor]:
    def stop(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step == 0
        return values

    return [pixels(pipe, callback_on_step_end=stop, output_type="latent")]


def embedded_elsewhere(pipe: Any) -> list[torch.Tensor]:
    """One pipeline has the text encoder alone, and another all but that."""
    parts = dict(pipe.components) | {"requires_safety_checker": False}
    nothing = dict.fromkeys(("unet", "vae", "scheduler"))
    with torch.no_grad():
        found = type(pipe)(**parts | nothing).encode_prompt("a cat", "cpu", 1, True)
    blind = type(pipe)(**parts | {"text_encoder": None, "tokenizer": None})
    blind.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 2, "output_type": "pt", "width": 64, "height": 64}
    embeds = {"prompt_embeds": found[0], "negative_prompt_embeds": found[1]}
    return [blind(**call, **embeds, generator=torch.Generator().manual_seed(1)).images, pixels(pipe)]


def handed_on(pipe: Any) -> list[torch.Tensor]:
    """Another pipeline with the same modules."""
    import diffusers

    images = []
    for kind in (diffusers.StableDiffusionImg2ImgPipeline, diffusers.AutoPipelineForImage2Image):
        other = kind.from_pipe(pipe)
        other.set_progress_bar_config(disable=True)
        assert all(other.components[name] is network for name, network in networks(pipe).items())
        images.append(pixels(other, "StableDiffusionImg2ImgPipeline"))
    return [*images, pixels(pipe)]


KINDS: dict[Callable[[Any], list[torch.Tensor]], list[str]] = {
    fused: [f"{name}{OWN}its attention is FusedAttnProcessor2_0" for name in ("unet", "vae.decoder")],
    stored_in_fp8: [f"unet{OWN}hooks are on its layers"],
    interrupted: [],
    embedded_elsewhere: [],
    handed_on: [],
}


@pytest.mark.parametrize("act", KINDS, ids=lambda act: act.__name__)
def test_it_is_as_before(act: Callable[[Any], list[torch.Tensor]], pipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    other = copy.deepcopy(pipe)
    expected = act(other)
    with caplog.at_level(logging.WARNING, "fastsd"), accelerated(pipe):
        pixels(pipe)
        found = act(pipe)
    for one, same in zip(found, expected, strict=True):
        assert one.std() > 0.01 and (one - same).abs().max() < TOLERANCE
    assert [r.message for r in caplog.records if r.name == "fastsd.diffusers"] == KINDS[act]


def test_two_t2i_adapters_at_odd_sizes(families: Families) -> None:
    """The last level's maps have an odd side, which the UNet halves and doubles again."""
    import diffusers

    name = "StableDiffusionAdapterPipeline"
    pipe = make(families, name)
    pipe.adapter = diffusers.MultiAdapter([pipe.adapter, copy.deepcopy(pipe.adapter)])
    photos = [PHOTO.resize((72, 72)), PHOTO.rotate(90).resize((72, 72))]
    call = {"image": photos, "adapter_conditioning_scale": [0.4, 0.9], "height": 72, "width": 72}
    expected = pixels(pipe, name, **call)
    with accelerated(pipe):
        assert (pixels(pipe, name, **call) - expected).abs().max() < TOLERANCE
    assert expected.std() > 0.01 and (pixels(pipe, name, **call) == expected).all()


def test_an_autoencoder_that_fastsd_lacks(pipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    import diffusers

    torch.manual_seed(0)
    pipe.vae = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(16,) * 4, decoder_block_out_channels=(16,) * 4, num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4,
    ).eval()  # fmt: skip
    expected = pixels(pipe)
    with caplog.at_level(logging.WARNING, "fastsd"), accelerated(pipe):
        assert (pixels(pipe) - expected).abs().max() < TOLERANCE
    assert [r.message for r in caplog.records] == ["vae runs in diffusers' own code: fastsd has no AutoencoderTiny"]
    fastsd.restore(pipe)
