"""The image to edit and the depth map that a UNet reads beside the latent: what a call needs, refuses and notes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastsd import Control
from fastsd.config import ControlNetConfig, TAESDConfig
from fastsd.errors import FastsdError
from fastsd.generate.beside import depth_latent, edited_latent
from fastsd.generate.latents import Codec, image_tensor
from fastsd.generate.request import plan
from fastsd.graph import Graphs
from fastsd.image.files import as_depth
from fastsd.model.controlnet import ControlNet
from fastsd.model.taesd import TAESD
from tests.support import tiny
from tests.support.pipelines import MASK, PHOTO, graphed_pipeline, latents, tiny_components, tiny_pipeline

EDITS, READS_DEPTH = 8, 5  # channels
DEPTH = Image.linear_gradient("L").resize((48, 32))


def planned(in_channels: int, **arguments: Any) -> Any:
    components = tiny_components(in_channels)
    return plan(components, tiny_pipeline(in_channels).defaults, {"prompt": "a cat", "seed": 1, **arguments})


REFUSED: dict[str, tuple[int, dict[str, Any], str]] = {
    "nothing to edit": (EDITS, {}, "this model edits an image: give image"),
    "no depth map": (READS_DEPTH, {"image": PHOTO}, "this model reads a depth map, .*: give depth_image"),
    "a depth map for any model": (4, {"depth_image": DEPTH}, "depth_image.*the model reads no depth map; a ControlNet"),
    "no image": (READS_DEPTH, {"depth_image": "depth.png"}, "depth_image.*should be a PIL image, not str"),
    "a flat map": (READS_DEPTH, {"depth_image": Image.new("L", (9, 9), 7)}, "depth_image.*one depth everywhere"),
    "image guidance without an image": (4, {"image_guidance_scale": 2.0}, "given without image, the image to edit"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_each_mistake_is_one_line(reason: str) -> None:
    channels, arguments, message = REFUSED[reason]
    with pytest.raises(FastsdError, match=message) as error:
        planned(channels, **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("scales", "parts", "note"),
    [
        ({}, 3, None),  # 7.5 and 1.5
        ({"guidance_scale": 4.0, "image_guidance_scale": 1.0}, 3, None),
        ({"guidance_scale": 1.0}, 1, None),
        ({"guidance_scale": 0.5, "image_guidance_scale": 2.0}, 1, "image guidance has no effect: guidance 0.5 turns"),
        ({"image_guidance_scale": 0.9}, 1, "guidance is off: the image guidance is 0.9, and below 1"),
    ],
)
def test_two_scales(scales: dict[str, float], parts: int, note: str | None) -> None:
    """Both guide, or neither, as in diffusers; what has no effect is said."""
    request = planned(EDITS, image=PHOTO, **scales)
    assert request.passes[0].parts == parts == max(request.passes[0].workload.parts, 1) - (parts == 1)
    assert any(note in found for found in request.notes) if note else not any("guidance" in n for n in request.notes)


def test_the_image_guidance_of_other_models_is_said_to_have_no_effect() -> None:
    """A1111's images hold "Image CFG scale" whatever the model."""
    request = planned(4, image=PHOTO, image_guidance_scale=1.5)
    assert any("image guidance has no effect: the model reads no image" in note for note in request.notes)
    assert request.passes[0].parts == 2 and request.settings.image_guidance_scale is None


def test_an_edit_starts_from_noise_unless_a_strength_is_given() -> None:
    assert planned(EDITS, image=PHOTO).passes[0].strength == 1.0
    assert planned(EDITS, image=PHOTO, strength=0.6).passes[0].strength == 0.6
    assert planned(4, image=PHOTO).passes[0].strength == 0.8
    pipe = tiny_pipeline(EDITS)
    full = latents(pipe, image=PHOTO)
    assert torch.equal(full, latents(pipe, image=PHOTO, strength=1.0))
    assert not torch.equal(full, latents(pipe, image=PHOTO, strength=0.7))


def test_a_mask_and_an_edit() -> None:
    """Outside the mask the latents are the image's, as with any model."""
    pipe = tiny_pipeline(EDITS)
    found = [latents(pipe, image=PHOTO, mask_image=MASK, seed=seed)[0, :, :4, 4:] for seed in (1, 2)]
    assert not torch.equal(latents(pipe, image=PHOTO, seed=1), latents(pipe, image=PHOTO, seed=2))
    assert all(torch.isfinite(part).all() for part in found)


def test_each_image_of_a_batch_is_as_alone() -> None:
    for channels, arguments in ((EDITS, {"image": PHOTO}), (READS_DEPTH, {"depth_image": DEPTH})):
        pipe = tiny_pipeline(channels)
        together = latents(pipe, num_images_per_prompt=3, seed=4, **arguments)
        for i in range(3):
            alone = latents(pipe, seed=4 + i, **arguments)
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-5)


def test_a_depth_map_sets_the_size_and_serves_both_passes() -> None:
    """Text to image: no image is needed. The hires fix reads the map at its own size."""
    pipe = tiny_pipeline(READS_DEPTH)
    assert latents(pipe, depth_image=DEPTH).shape[2:] == (4, 6)
    assert latents(pipe, depth_image=DEPTH, width=64, height=64).shape[2:] == (8, 8)
    assert latents(pipe, depth_image=DEPTH, hires_scale=2.0).shape[2:] == (8, 12)
    other = latents(pipe, depth_image=DEPTH.transpose(Image.Transpose.FLIP_TOP_BOTTOM))
    assert not torch.equal(other, latents(pipe, depth_image=DEPTH))


@pytest.mark.parametrize("mode", ["L", "RGB", "I;16", "I", "F"])
def test_every_kind_of_depth_map(mode: str) -> None:
    """The same map of 8 bits, of 16 and of numbers: only its proportions count."""
    values = np.add.outer(np.arange(16), np.arange(24)).astype(np.uint8)
    if mode in ("L", "RGB"):
        image = Image.fromarray(values).convert(mode)
    else:
        kinds = {"I;16": np.uint16, "I": np.int32, "F": np.float32}
        image = Image.fromarray((values.astype(np.int64) * 300).astype(kinds[mode]))
        assert image.mode == mode
    found = depth_latent(as_depth(image), 4, 6)
    assert found.shape == (1, 4, 6, 1) and float(found.min()) == -1.0 and float(found.max()) == 1.0
    torch.testing.assert_close(found, depth_latent(as_depth(Image.fromarray(values)), 4, 6), rtol=0, atol=1e-6)


def test_a_controlnet_steers_an_edit() -> None:
    """It reads the latent alone, for each of the three samples."""
    pipe = tiny_pipeline(EDITS)
    config = ControlNetConfig(replace(tiny.UNET, in_channels=4), (8, 8, 8, 8))
    torch.manual_seed(2)
    net = ControlNet(config).requires_grad_(False)
    plain = latents(pipe, image=PHOTO)
    off, on = (latents(pipe, image=PHOTO, controls=[Control(net, PHOTO, weight=weight)]) for weight in (0.0, 5.0))
    assert torch.equal(plain, off) and torch.isfinite(on).all() and not torch.equal(plain, on)


@pytest.mark.parametrize("scaled", [False, True])
def test_the_tiny_autoencoder_gives_the_image_at_the_scale_that_the_unet_reads(scaled: bool) -> None:
    """TAESD's latents are those that the diffusion model sees; InstructPix2Pix reads them unscaled, CosXL scaled."""
    torch.manual_seed(3)
    small = TAESD(TAESDConfig(block_out_channels=(8,) * 4)).requires_grad_(False)
    components = replace(tiny_components(EDITS), vae=small, scaled_image=scaled)
    found = edited_latent(Codec(small, Graphs()), PHOTO, False, components)
    mean, _ = small.encode(image_tensor(PHOTO))
    torch.testing.assert_close(found, mean if scaled else mean / 0.18215)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("channels", [EDITS, READS_DEPTH])
def test_graphs_give_the_same_and_serve_every_scale(channels: int) -> None:
    """Scales, images and depth maps are in buffers: nothing is captured anew."""
    extra: dict[str, Any] = {"image": PHOTO} if channels == EDITS else {"depth_image": DEPTH.resize((64, 64))}
    changes = [{}, {"guidance_scale": 3.0}, {"prompt": "a dog"}]
    changes += [{"image_guidance_scale": 2.5}] if channels == EDITS else []
    pipe, recorder = graphed_pipeline(in_channels=channels)
    eager = tiny_pipeline(channels)
    captures = []
    for change in changes:
        torch.testing.assert_close(latents(pipe, **extra | change), latents(eager, **extra | change))
        captures.append(recorder.recorded)
    assert len(set(captures)) == 1
