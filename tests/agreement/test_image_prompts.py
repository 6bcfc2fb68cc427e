"""Image prompts agree with diffusers' IP-Adapters: every kind of file, alone and with all else that a call takes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fastsd import Control, ImagePrompt, Pipeline
from fastsd.image.clip_input import clip_input
from fastsd.weights.layouts.vision import load_vision
from tests.support.families import TOLERANCE, Families, disturbed, generator, latents_of
from tests.support.ip_adapters import KINDS, SIDE, make_adapter, make_processor, make_tower
from tests.support.matching import relative_error

PROMPT = "a cat on a mat"
SETTINGS: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 4.0, "negative_prompt": "blue"}
RANDOM = np.random.RandomState(2)
PHOTOS = [Image.fromarray(RANDOM.randint(0, 256, (60, 90, 3), dtype=np.uint8)) for _ in range(3)]
START = Image.fromarray(RANDOM.randint(0, 256, (64, 64, 3), dtype=np.uint8))


class Made(NamedTuple):
    """Files of every kind for each family, and the tower."""

    folder: Path
    tower: Any

    def file(self, family: str, kind: str) -> Path:
        return self.folder / f"{family}-{kind}.safetensors"


@pytest.fixture(scope="module")
def made(families: Families, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(6)
    found = Made(folder, make_tower(folder / "image_encoder"))
    for family in ("sd1", "sdxl"):
        unet = families.pipelines[family].unet
        layers = [
            unet.get_submodule(name.removesuffix(".processor")) for name in unet.attn_processors if "attn2" in name
        ]
        widths = [layer.to_k.weight.shape[0] for layer in layers]
        for k, kind in enumerate(KINDS):
            save_file(make_adapter(kind, unet.config.cross_attention_dim, widths, k), found.file(family, kind))
    return found


def theirs(families: Families, name: str, family: str, made: Made, kinds: list[str], scale: Any, **extra: Any) -> Any:
    import diffusers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        extra |= {} if family == "sdxl" else {"safety_checker": None}
        parts = {"image_encoder": made.tower, "feature_extractor": make_processor()}
        pipe = getattr(diffusers, name).from_pretrained(families.folder / family, **parts, **extra)
        files = [made.file(family, kind).name for kind in kinds]
        pipe.load_ip_adapter(str(made.folder), subfolder="", weight_name=files, image_encoder_folder=None)
    pipe.set_ip_adapter_scale(scale)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ours(families: Families, family: str, made: Made, kinds: list[str], scales: list[float], images: Any) -> Any:
    pipe = Pipeline.from_pretrained(families.folder / family, device="cpu", dtype="fp32")
    prompts = [
        ImagePrompt(pipe.load_ip_adapter(made.file(family, kind)), own, scale)
        for kind, own, scale in zip(kinds, images, scales, strict=True)
    ]
    return pipe, prompts


def test_the_input_is_transformers(made: Made) -> None:
    processor = make_processor()
    for size in ((60, 90), (90, 60), (32, 32), (33, 500)):
        photo = Image.fromarray(RANDOM.randint(0, 256, (*size, 3), dtype=np.uint8))
        expected = torch.as_tensor(np.array(processor(photo, return_tensors="np").pixel_values))
        found = clip_input(photo, SIDE).permute(0, 3, 1, 2)
        assert (found - expected).abs().max() < 1e-5  # fp32's rounding of values up to 2.2, a few operations


@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
def test_the_tower_is_transformers(tmp_path: Path, act: str) -> None:
    torch.manual_seed(1)
    tower = make_tower(tmp_path / "tower", act)
    pixels = torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        expected = tower(pixels, output_hidden_states=True)
        found = load_vision(tmp_path / "tower", torch.float32, torch.device("cpu"))(pixels.permute(0, 2, 3, 1))
    assert relative_error(found.embedding, expected.image_embeds) < 1e-5
    assert relative_error(found.hidden, expected.hidden_states[-2]) < 1e-5


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(families: Families, made: Made, family: str, kind: str) -> None:
    xl = "XL" if family == "sdxl" else ""
    pipe = theirs(families, f"StableDiffusion{xl}Pipeline", family, made, [kind], 0.7)
    sizes = {"height": 64, "width": 64}
    expected = latents_of(pipe, PROMPT, ip_adapter_image=PHOTOS[0], generator=generator(3), **sizes, **SETTINGS)
    own, prompts = ours(families, family, made, [kind], [0.7], [PHOTOS[0]])
    found = latents_of(own, PROMPT, image_prompts=prompts, seed=3, **sizes, **SETTINGS)
    assert relative_error(found, expected) < TOLERANCE
    without = latents_of(own, PROMPT, seed=3, **sizes, **SETTINGS)
    assert relative_error(without, expected) > 100 * TOLERANCE


def test_several_adapters_and_images_without_guidance(families: Families, made: Made) -> None:
    kinds, scales = ["embedding", "resampler"], [0.5, 0.9]
    pipe = theirs(families, "StableDiffusionPipeline", "sd1", made, kinds, scales)
    images = [PHOTOS[:2], PHOTOS[2:]]
    settings = SETTINGS | {"guidance_scale": 1.0, "height": 64, "width": 64}
    expected = latents_of(pipe, PROMPT, ip_adapter_image=images, generator=generator(3), **settings)
    own, prompts = ours(families, "sd1", made, kinds, scales, images)
    found = latents_of(own, PROMPT, image_prompts=prompts, seed=3, **settings)
    assert relative_error(found, expected) < TOLERANCE


def test_masks(families: Families, made: Made) -> None:
    from diffusers.image_processor import IPAdapterMaskProcessor

    areas = [np.zeros((64, 96), dtype=np.uint8) for _ in range(2)]
    areas[0][:, :40], areas[1][20:, 30:] = 255, 255
    masks = [Image.fromarray(area) for area in areas]
    both = IPAdapterMaskProcessor().preprocess(masks, height=64, width=96)
    pipe = theirs(families, "StableDiffusionPipeline", "sd1", made, ["resampler"], [[0.7, 1.1]])
    settings = SETTINGS | {"height": 64, "width": 96}
    expected = latents_of(
        pipe,
        PROMPT,
        ip_adapter_image=[PHOTOS[:2]],
        cross_attention_kwargs={"ip_adapter_masks": [both.reshape(1, 2, 64, 96)]},
        generator=generator(3),
        **settings,
    )
    own = Pipeline.from_pretrained(families.folder / "sd1", device="cpu", dtype="fp32")
    adapter = own.load_ip_adapter(made.file("sd1", "resampler"))
    prompts = [ImagePrompt(adapter, PHOTOS[0], 0.7, masks[0]), ImagePrompt(adapter, [PHOTOS[1]], 1.1, masks[1])]
    found = latents_of(own, PROMPT, image_prompts=prompts, seed=3, **settings)
    assert relative_error(found, expected) < TOLERANCE


@pytest.mark.parametrize("name", ["Img2Img", "Inpaint", "ControlNet"])
def test_with_all_else(families: Families, made: Made, name: str) -> None:
    import diffusers

    area = np.zeros((64, 64), dtype=np.uint8)
    area[16:48, 8:40] = 255
    own, prompts = ours(families, "sd1", made, ["embedding"], [0.8], [PHOTOS[0]])
    given: dict[str, Any] = {"image": START, "strength": 0.75}
    mine: dict[str, Any] = dict(given)
    extra = {}
    if name == "Inpaint":
        given["mask_image"] = mine["mask_image"] = Image.fromarray(area)
        given |= {"height": 64, "width": 64}
    if name == "ControlNet":
        torch.manual_seed(5)
        net = disturbed(
            diffusers.ControlNetModel.from_unet(
                families.pipelines["sd1"].unet, conditioning_embedding_out_channels=(8, 12, 16, 24)
            )
        )
        net.save_pretrained(made.folder / "net")
        extra = {"controlnet": net}
        given = {"image": START, "controlnet_conditioning_scale": 0.8, "height": 64, "width": 64}
        mine = {"controls": [Control(own.load_controlnet(made.folder / "net"), START, 0.8)]}
    pipe = theirs(families, f"StableDiffusion{name}Pipeline", "sd1", made, ["embedding"], 0.8, **extra)
    expected = latents_of(pipe, PROMPT, ip_adapter_image=PHOTOS[0], generator=generator(3), **given, **SETTINGS)
    found = latents_of(own, PROMPT, image_prompts=prompts, seed=3, **mine, **SETTINGS)
    assert relative_error(found, expected) < TOLERANCE
