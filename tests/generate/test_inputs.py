"""Arguments of a call that are wrong, or right and without effect: one line that says so."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastsd import Control
from fastsd.config import ControlNetConfig
from fastsd.errors import FastsdError
from fastsd.generate.sizes import fit_image, read_image
from fastsd.image.files import BLACK
from fastsd.model.controlnet import ControlNet
from fastsd.pipeline import Pipeline
from tests.support.pipelines import PHOTO, tiny_pipeline


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def control(pipe: Pipeline) -> Control:
    net = ControlNet(ControlNetConfig(pipe.components.unet.config, (8, 8, 8, 8)))
    return Control(net.eval().requires_grad_(False), PHOTO)


def latents(pipe: Pipeline, **arguments: Any) -> torch.Tensor:
    return pipe("a cat", seed=1, output_type="latent", **arguments).images


def test_controls_that_are_no_list(pipe: Pipeline, control: Control) -> None:
    for wrong in (control, control.net, [control.net], 3):
        with pytest.raises(FastsdError, match="^controls: should be a list of fastsd.Control"):
            pipe("a cat", controls=wrong)


def test_a_controlnet_of_another_pipeline(control: Control) -> None:
    """In another precision it would fail somewhere in its first layer."""
    with pytest.raises(
        FastsdError, match=r"controls\[0\].net: it is fp32 on cpu and the model bf16 on cpu; load it with"
    ):
        latents(tiny_pipeline(dtype=torch.bfloat16), controls=[control])


def test_a_controlnet_for_latents_of_another_size(pipe: Pipeline, control: Control) -> None:
    net = ControlNet(ControlNetConfig(pipe.components.unet.config, (8, 8)))
    with pytest.raises(FastsdError, match=r"controls\[0\].net: it shrinks its image to 1/2 and .* to 1/8"):
        latents(pipe, controls=[replace(control, net=net)])


def test_controls_that_take_part_in_no_step_are_named(pipe: Pipeline, control: Control) -> None:
    idle = replace(control, start=0.3, end=0.4)
    result = pipe("a cat", seed=1, num_inference_steps=4, controls=[control, idle], output_type="latent")
    assert result.notes == ["control 2 takes part in no step: none of the 4 lies within 0.3 and 0.4"]
    assert torch.equal(result.images, latents(pipe, num_inference_steps=4, controls=[control]))
    for quiet in (replace(idle, end=0.75), replace(idle, weight=0.0)):
        assert pipe("a cat", num_inference_steps=4, controls=[quiet], output_type="latent").notes == []


def test_controls_in_the_refiners_steps_alone_are_named(pipe: Pipeline, control: Control) -> None:
    both = Pipeline(pipe.components, pipe.device, pipe.dtype, refiner=tiny_pipeline().components)
    settings: dict[str, Any] = {"num_inference_steps": 4, "refiner_switch": 0.5, "output_type": "latent"}
    late = both("a cat", seed=1, controls=[replace(control, start=0.75)], **settings)
    assert late.notes == ["control 1 takes part in no step: the refiner, which ignores controls, does all of its steps"]
    assert both("a cat", seed=1, controls=[control], **settings).notes == []


@pytest.mark.parametrize("name", ["original_size", "negative_original_size", "negative_target_size"])
def test_sizes_that_the_model_does_not_read_are_named(pipe: Pipeline, name: str) -> None:
    result = pipe("a cat", num_inference_steps=1, output_type="latent", **{name: (32, 32)})
    assert result.notes == [f"{name} has no effect: only models of SDXL's family read it"]


def test_variations_of_a_generators_noise(pipe: Pipeline) -> None:
    """They are those of its seed, for one generator and for a list of them."""
    settings: dict[str, Any] = {"num_inference_steps": 1, "output_type": "latent", "subseed": 9}
    one, two = (torch.Generator().manual_seed(1) for _ in range(2))
    wanted = pipe("a cat", seed=1, subseed_strength=0.5, num_images_per_prompt=2, **settings).images
    assert torch.equal(pipe("a cat", generator=one, subseed_strength=0.5, **settings).images, wanted[:1])
    both = [torch.Generator().manual_seed(1), two]
    assert torch.equal(pipe(["a cat"] * 2, generator=both, subseed_strength=0.5, **settings).images, wanted)


def test_steps_of_a_second_pass_that_is_not_asked_for(pipe: Pipeline) -> None:
    with pytest.raises(FastsdError, match="hires_steps: given without hires_scale"):
        latents(pipe, hires_steps=3)


def test_a_strength_that_leaves_no_step_is_named(pipe: Pipeline) -> None:
    said = "changes nothing: strength 0.2 of 4 steps is less than one"
    settings: dict[str, Any] = {"num_inference_steps": 4, "output_type": "latent"}
    assert pipe("a cat", image=PHOTO, strength=0.2, **settings).notes == [f"the run {said}"]
    assert pipe("a cat", hires_scale=2, hires_strength=0.2, **settings).notes == [f"the second pass {said}"]
    for quiet in ({"image": PHOTO, "strength": 0.0}, {"image": PHOTO, "strength": 0.25}, {"hires_scale": 2}):
        assert pipe("a cat", **quiet, **settings).notes == []


def test_images_of_other_modes_are_read_as_from_files(pipe: Pipeline, control: Control) -> None:
    """16 bits, as depths are stored, are scaled: Pillow's `convert` would cut them at 255."""
    values = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16
    deep = Image.fromarray(values)
    shallow = Image.fromarray(((values.astype(int) + 128) // 257).astype(np.uint8))
    assert deep.mode.startswith("I") and len(np.unique(shallow)) == 256
    assert np.array_equal(fit_image(deep, None, None, 8)[0], shallow.convert("RGB"))
    assert np.array_equal(read_image(deep, "mask_image", "L", BLACK)[0], shallow)
    found, wanted = (latents(pipe, controls=[replace(control, image=image)]) for image in (deep, shallow))
    assert torch.equal(found, wanted)
    clear = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    assert fit_image(clear, None, None, 8)[0].getpixel((0, 0)) == (255, 255, 255)
    assert read_image(clear, "mask_image", "L", BLACK)[0].getpixel((0, 0)) == 0
    with pytest.raises(FastsdError, match=r"controls\[0\].image: its floating-point pixels"):
        pipe("a cat", controls=[replace(control, image=Image.new("F", (64, 64), 0.5))])


@pytest.mark.parametrize("argument", ["image", "mask_image", "controls"])
def test_an_opened_file_that_is_cut_short_is_an_error_of_its_argument(
    pipe: Pipeline, control: Control, argument: str
) -> None:
    data = io.BytesIO()
    PHOTO.save(data, "PNG")
    cut: Any = Image.open(io.BytesIO(data.getvalue()[: len(data.getvalue()) // 2]))
    arguments = {"image": PHOTO, argument: [replace(control, image=cut)] if argument == "controls" else cut}
    with pytest.raises(FastsdError, match=rf"{argument}.*: its file is damaged, cut short or was closed"):
        pipe("a cat", num_inference_steps=2, **arguments)


@pytest.mark.parametrize("argument", ["image", "mask_image"])
def test_an_image_without_pixels_is_none(pipe: Pipeline, argument: str) -> None:
    with pytest.raises(FastsdError, match=f"{argument}: 0x4 pixels"):
        pipe("a cat", **{"image": PHOTO, argument: Image.new("RGB", (0, 4))})


@pytest.mark.parametrize("file", ["a.png", Path("a.png"), b"PNG"])
def test_a_path_in_place_of_an_image_is_told_how_to_open_it(pipe: Pipeline, file: Any) -> None:
    with pytest.raises(FastsdError, match=r"image: should be a PIL image, not \w+; PIL.Image.open"):
        pipe("a cat", image=file)
