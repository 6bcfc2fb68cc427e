"""ControlNets agree with diffusers', alone and in generated images, from every form of file."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fastsd import Control, Pipeline
from fastsd.model.controlnet import ControlNet
from fastsd.model.unet import AddedConditioning
from tests.support.families import TOLERANCE, Families, disturbed, generator, latents_of
from tests.support.matching import nchw, nhwc, relative_error
from tests.support.original import controlnet_tensors

PROMPT = "a cat on a mat"
FAMILIES = ("sd1", "sd2", "sdxl", "inpainting")
HINTS = (8, 12, 16, 24)
SETTINGS: dict[str, Any] = {"num_inference_steps": 5, "guidance_scale": 4.0}


@pytest.fixture(scope="module")
def nets(families: Families, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Two of diffusers' ControlNets for each family, saved in `<family>-<i>`."""
    import diffusers

    torch.manual_seed(5)
    nets = {}
    for family in FAMILIES:
        unet = families.pipelines["sd1" if family == "inpainting" else family].unet
        nets[family] = [
            disturbed(diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=HINTS))
            for _ in range(2)
        ]
        for i, net in enumerate(nets[family]):
            net.save_pretrained(families.folder / f"controlnet-{family}-{i}")
    return nets


@pytest.fixture(scope="module")
def photos() -> Iterator[list[Image.Image]]:
    random = np.random.RandomState(1)
    yield [Image.fromarray(random.randint(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(3)]


@pytest.fixture(scope="module")
def mask() -> Image.Image:
    area = np.zeros((64, 64), dtype=np.uint8)
    area[16:48, 8:40] = 255
    return Image.fromarray(area)


def ours(families: Families, family: str) -> Pipeline:
    return Pipeline.from_pretrained(families.folder / family, device="cpu", dtype="fp32")


def loaded(pipe: Pipeline, families: Families, family: str, i: int = 0) -> ControlNet:
    return pipe.load_controlnet(families.folder / f"controlnet-{family}-{i}")


def theirs(families: Families, pipeline_class: str, family: str, nets: Any) -> Any:
    """diffusers' pipeline with ControlNets."""
    import diffusers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        extra = {} if family == "sdxl" else {"safety_checker": None}
        pipe = getattr(diffusers, pipeline_class).from_pretrained(families.folder / family, controlnet=nets, **extra)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: Any, **arguments: Any) -> torch.Tensor:
    """The latents of diffusers' pipeline."""
    return latents_of(pipe, PROMPT, generator=generator(3), **arguments)


@pytest.mark.parametrize("family", FAMILIES[:3])
def test_residuals(families: Families, nets: Any, family: str) -> None:
    net = loaded(ours(families, family), families, family)
    torch.manual_seed(0)
    x, photo = torch.randn(2, 4, 8, 8), torch.rand(2, 3, 64, 64)
    time, text = torch.tensor([7.0, 801.0]), torch.randn(2, 5, net.config.cross_attention_dim)
    added, their_added = None, {}
    if family == "sdxl":
        added = AddedConditioning(torch.randn(2, 24), torch.rand(2, 6) * 64)
        their_added = {"added_cond_kwargs": {"text_embeds": added.pooled, "time_ids": added.sizes}}
    with torch.no_grad():
        down, middle = nets[family][0](x, time, text, photo, conditioning_scale=0.7, return_dict=False, **their_added)
        residuals = net.denoise(
            nhwc(x),
            net.embed_time(time, added),
            net.project_context(text),
            net.embed_hint(nhwc(photo)),
            torch.tensor([0.7]),
        )
    for residual, expected in zip(residuals, (*down, middle), strict=True):
        assert float((nchw(residual) - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("family", FAMILIES[:3])
def test_text_to_image(families: Families, nets: Any, family: str, photos: list[Image.Image]) -> None:
    xl = "XL" if family == "sdxl" else ""
    pipe = ours(families, family)
    arguments = {"negative_prompt": "blue", **SETTINGS}
    expected = run(
        theirs(families, f"StableDiffusion{xl}ControlNetPipeline", family, nets[family][0]),
        image=photos[0],
        controlnet_conditioning_scale=0.8,
        height=64,
        width=64,
        **arguments,
    )
    control = Control(loaded(pipe, families, family), photos[0], weight=0.8)
    latents = pipe(PROMPT, controls=[control], seed=3, output_type="latent", **arguments).images
    assert relative_error(latents, expected) < TOLERANCE
    without = pipe(PROMPT, seed=3, output_type="latent", **arguments).images
    assert relative_error(without, expected) > 100 * TOLERANCE  # the ControlNet matters


@pytest.mark.parametrize(("start", "end"), [((0.0, 0.4), (0.6, 1.0)), ((0.2, 0.0), (0.8, 0.1))])
def test_several_that_act_in_parts_of_the_steps(
    families: Families, nets: Any, photos: list[Image.Image], start: tuple[float, float], end: tuple[float, float]
) -> None:
    expected = run(
        theirs(families, "StableDiffusionControlNetPipeline", "sd1", nets["sd1"]),
        image=photos[:2],
        controlnet_conditioning_scale=[0.8, 1.3],
        control_guidance_start=list(start),
        control_guidance_end=list(end),
        height=64,
        width=64,
        **SETTINGS,
    )
    pipe = ours(families, "sd1")
    controls = [Control(loaded(pipe, families, "sd1", i), photos[i], (0.8, 1.3)[i], start[i], end[i]) for i in range(2)]
    latents = pipe(PROMPT, controls=controls, seed=3, output_type="latent", **SETTINGS).images
    assert relative_error(latents, expected) < TOLERANCE


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_image_to_image(families: Families, nets: Any, family: str, photos: list[Image.Image]) -> None:
    xl = "XL" if family == "sdxl" else ""
    expected = run(
        theirs(families, f"StableDiffusion{xl}ControlNetImg2ImgPipeline", family, nets[family][0]),
        image=photos[1],
        control_image=photos[0],
        controlnet_conditioning_scale=1.0,
        strength=0.6,
        **SETTINGS,
    )
    pipe = ours(families, family)
    control = Control(loaded(pipe, families, family), photos[0])
    arguments = {"image": photos[1], "strength": 0.6, "seed": 3, "output_type": "latent", **SETTINGS}
    latents = pipe(PROMPT, controls=[control], **arguments).images
    assert relative_error(latents, expected) < TOLERANCE


@pytest.mark.parametrize("family", ["sd1", "inpainting"])
def test_inpainting(families: Families, nets: Any, family: str, photos: list[Image.Image], mask: Image.Image) -> None:
    arguments = {"image": photos[1], "mask_image": mask, "strength": 0.8, **SETTINGS}
    expected = run(
        theirs(families, "StableDiffusionControlNetInpaintPipeline", family, nets[family][0]),
        control_image=photos[0],
        controlnet_conditioning_scale=1.0,
        height=64,
        width=64,
        **arguments,
    )
    pipe = ours(families, family)
    control = Control(loaded(pipe, families, family), photos[0])
    latents = pipe(PROMPT, controls=[control], seed=3, output_type="latent", **arguments).images
    assert relative_error(latents, expected) < TOLERANCE


@pytest.mark.parametrize("prefix", ["", "control_model."])
@pytest.mark.parametrize("family", FAMILIES[:3])
def test_single_files(families: Families, nets: Any, tmp_path: Path, family: str, prefix: str) -> None:
    """The weights are the same from both layouts, with and without the prefix of training checkpoints."""
    pipe = ours(families, family)
    expected = loaded(pipe, families, family).state_dict()
    stored = load_file(families.folder / f"controlnet-{family}-0" / "diffusion_pytorch_model.safetensors")
    for name, tensors in (("diffusers", stored), ("original", controlnet_tensors(stored, layers=1, levels=2))):
        file = tmp_path / f"{name}.safetensors"
        save_file({prefix + key: tensor for key, tensor in tensors.items()}, file)
        weights = pipe.load_controlnet(file).state_dict()
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[key], expected[key]) for key in expected)


def test_a_bgr_controlnet_reads_the_channels_in_reverse(families: Families, nets: Any, tmp_path: Path) -> None:
    import diffusers

    torch.manual_seed(6)
    unet = families.pipelines["sd1"].unet
    net = disturbed(
        diffusers.ControlNetModel.from_unet(
            unet, controlnet_conditioning_channel_order="bgr", conditioning_embedding_out_channels=HINTS
        )
    )
    net.save_pretrained(tmp_path / "bgr")
    loaded_net = ours(families, "sd1").load_controlnet(tmp_path / "bgr")
    photo = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = net.controlnet_cond_embedding(photo.flip(1))
        hint = nchw(loaded_net.embed_hint(nhwc(photo)))
    assert float((hint - expected).norm() / expected.norm()) < 1e-5
