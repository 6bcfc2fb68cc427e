"""T2I-Adapters agree with diffusers', alone and in generated images, from every form of file."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fastsd import Control, FastsdError, Pipeline
from fastsd.config import UNetConfig
from fastsd.model.t2i_adapter import T2IAdapter
from fastsd.weights.layouts.controlnet import load_controlnet
from tests.support import tiny
from tests.support.families import TOLERANCE, Families, disturbed, generator, latents_of
from tests.support.matching import nchw, nhwc, relative_error

PROMPT = "a cat on a mat"
RANDOM = np.random.RandomState(4)
PHOTOS = [Image.fromarray(RANDOM.randint(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(2)]
SETTINGS: dict[str, Any] = {"num_inference_steps": 5, "guidance_scale": 4.0, "width": 64, "height": 64}
WIDTHS = (8, 16, 16)  # of three levels, as SDXL has; SD 1 has one more
SD1 = replace(tiny.UNET, block_out_channels=(*WIDTHS, 16), transformer_layers_per_block=(1, 1, 1, 0))
SDXL = replace(tiny.UNET, block_out_channels=WIDTHS, transformer_layers_per_block=(0, 1, 2))
KINDS: dict[str, tuple[UNetConfig, dict[str, Any]]] = {
    "full": (SD1, {"adapter_type": "full_adapter", "downscale_factor": 8}),
    "grey": (SD1, {"adapter_type": "full_adapter", "downscale_factor": 8, "in_channels": 1}),
    "light": (SD1, {"adapter_type": "light_adapter", "downscale_factor": 8, "channels": list(WIDTHS)}),
    "xl": (SDXL, {"adapter_type": "full_adapter_xl", "downscale_factor": 16}),
}


def make_adapter(seed: int, **arguments: Any) -> Any:
    import diffusers

    torch.manual_seed(seed)
    return disturbed(diffusers.T2IAdapter(**({"channels": [*WIDTHS, 16], "num_res_blocks": 2} | arguments)))


def in_original_names(state: dict[str, torch.Tensor], blocks: int = 2) -> dict[str, torch.Tensor]:
    """As TencentARC's files name them: full adapters number the blocks of all levels in one row."""

    def renamed(key: str) -> str:
        if any("out_conv" in other for other in state):
            return key.replace("resnets", "body")
        key = re.sub(r"body\.(\d)\.resnets\.(\d)", lambda m: f"body.{blocks * int(m[1]) + int(m[2])}", key)
        return re.sub(r"body\.(\d)\.in_conv", lambda m: f"body.{blocks * int(m[1])}.in_conv", key)

    return {renamed(key.removeprefix("adapter.")): value for key, value in state.items()}


def written(form: str, net: Any, folder: Path) -> Path:
    """The adapter in one of its forms."""
    if form == "folder":
        net.save_pretrained(folder / "net")
        return folder / "net"
    state = net.state_dict() if form == "file" else in_original_names(net.state_dict())
    if form == "pickle":
        torch.save(state, folder / "net.pth")
        return folder / "net.pth"
    save_file(state, folder / "net.safetensors")
    return folder / "net.safetensors"


@pytest.mark.parametrize("form", ["folder", "file", "original", "pickle"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_from_every_form(tmp_path: Path, kind: str, form: str) -> None:
    """On an image whose maps have odd sides, too: theirs refuses sides that are no multiple of the factor."""
    model, arguments = KINDS[kind]
    theirs = make_adapter(1, **arguments)
    own = load_controlnet(written(form, theirs, tmp_path), model, torch.float32, allow_pickle=form == "pickle")
    assert isinstance(own, T2IAdapter)
    factor, channels = own.config.downscale, own.config.in_channels
    image = torch.rand(1, channels, 7 * factor, 5 * factor)
    with torch.no_grad():
        expected, found = theirs(image), own(nhwc(image))
    for ours, wanted in zip(found, expected, strict=True):
        assert relative_error(nchw(ours), wanted) < 1e-5
    cut = own(nhwc(image)[:, :-3, :-1])
    assert [one.shape for one in cut] == [one.shape for one in found]


@pytest.fixture(scope="module")
def adapters(families: Families) -> dict[str, list[Any]]:
    """diffusers' adapters of each family, saved in `t2i-<family>-<i>`; the second of SD 1 reads grey images."""
    found = {
        "sd1": [make_adapter(i, channels=[32, 64], in_channels=channels) for i, channels in enumerate((3, 1))],
        "sdxl": [make_adapter(9, channels=[32, 64, 64], **KINDS["xl"][1])],
    }
    for family, nets in found.items():
        for i, net in enumerate(nets):
            net.save_pretrained(families.folder / f"t2i-{family}-{i}")
    return found


def theirs(families: Families, name: str, family: str, **parts: Any) -> Any:
    import diffusers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts |= {} if family == "sdxl" else {"safety_checker": None}
        pipe = getattr(diffusers, name).from_pretrained(families.folder / family, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ours(families: Families, family: str, *controls: dict[str, Any]) -> tuple[Pipeline, list[Control]]:
    pipe = Pipeline.from_pretrained(families.folder / family, device="cpu", dtype="fp32")
    nets = [pipe.load_controlnet(families.folder / f"t2i-{family}-{i}") for i in range(len(controls))]
    return pipe, [Control(net, PHOTOS[i], **given) for i, (net, given) in enumerate(zip(nets, controls, strict=True))]


def test_one(families: Families, adapters: dict[str, list[Any]]) -> None:
    pipe = theirs(families, "StableDiffusionAdapterPipeline", "sd1", adapter=adapters["sd1"][0])
    expected = latents_of(
        pipe, PROMPT, image=PHOTOS[0], adapter_conditioning_scale=0.7, generator=generator(3), **SETTINGS
    )
    own, controls = ours(families, "sd1", {"weight": 0.7})
    assert relative_error(latents_of(own, PROMPT, controls=controls, seed=3, **SETTINGS), expected) < TOLERANCE
    assert relative_error(latents_of(own, PROMPT, seed=3, **SETTINGS), expected) > 100 * TOLERANCE


def test_several(families: Families, adapters: dict[str, list[Any]]) -> None:
    import diffusers

    several = diffusers.MultiAdapter(adapters["sd1"])
    pipe = theirs(families, "StableDiffusionAdapterPipeline", "sd1", adapter=several)
    images = [PHOTOS[0], PHOTOS[1].convert("L")]
    expected = latents_of(
        pipe, PROMPT, image=images, adapter_conditioning_scale=[0.5, 0.9], generator=generator(3), **SETTINGS
    )
    own, controls = ours(families, "sd1", {"weight": 0.5}, {"weight": 0.9})
    assert relative_error(latents_of(own, PROMPT, controls=controls, seed=3, **SETTINGS), expected) < TOLERANCE


def test_the_first_steps_alone(families: Families, adapters: dict[str, list[Any]]) -> None:
    pipe = theirs(families, "StableDiffusionXLAdapterPipeline", "sdxl", adapter=adapters["sdxl"][0])
    expected = latents_of(
        pipe,
        PROMPT,
        image=PHOTOS[0],
        adapter_conditioning_scale=3.0,
        adapter_conditioning_factor=0.6,
        generator=generator(3),
        **SETTINGS,
    )
    own, controls = ours(families, "sdxl", {"weight": 3.0, "end": 0.6})
    assert relative_error(latents_of(own, PROMPT, controls=controls, seed=3, **SETTINGS), expected) < TOLERANCE
    whole = [replace(controls[0], end=1.0)]
    assert relative_error(latents_of(own, PROMPT, controls=whole, seed=3, **SETTINGS), expected) > 100 * TOLERANCE


@pytest.mark.parametrize("task", ["Img2Img", "Inpaint"])
def test_from_an_image(families: Families, adapters: dict[str, list[Any]], task: str) -> None:
    """diffusers has no such pipelines; its UNet takes the maps in the ones without adapters."""
    area = np.zeros((64, 64), dtype=np.uint8)
    area[16:48, 8:40] = 255
    given: dict[str, Any] = {"image": PHOTOS[1], "strength": 0.7}
    given |= {"mask_image": Image.fromarray(area)} if task == "Inpaint" else {}
    settings = SETTINGS | {"num_inference_steps": 8}
    pipe = theirs(families, f"StableDiffusion{task}Pipeline", "sd1")
    with torch.no_grad():
        pixels = torch.from_numpy(np.array(PHOTOS[0], dtype=np.float32) / 255.0).permute(2, 0, 1)[None]
        maps = adapters["sd1"][0](pixels)
    forward = pipe.unet.forward
    pipe.unet.forward = lambda *args, **rest: forward(
        *args, down_intrablock_additional_residuals=[torch.cat([one] * 2) for one in maps], **rest
    )
    theirs_takes = (
        settings if task == "Inpaint" else {k: v for k, v in settings.items() if k not in ("width", "height")}
    )
    expected = latents_of(pipe, PROMPT, generator=generator(3), **given, **theirs_takes)
    own, controls = ours(families, "sd1", {})
    assert relative_error(latents_of(own, PROMPT, controls=controls, seed=3, **given, **settings), expected) < TOLERANCE


def test_another_family_is_refused(families: Families, adapters: dict[str, list[Any]], tmp_path: Path) -> None:
    sd1 = Pipeline.from_pretrained(families.folder / "sd1", device="cpu", dtype="fp32")
    with pytest.raises(FastsdError, match="shrinks its image to 1/16; it belongs to SDXL's family"):
        sd1.load_controlnet(families.folder / "t2i-sdxl-0")
    xl, controls = ours(families, "sdxl", {})
    with pytest.raises(FastsdError, match=r"^controls\[0\].net: it (was loaded for a model of another|shrinks)"):
        sd1(PROMPT, controls=controls, **SETTINGS)
    other = make_adapter(2, channels=[16, 64])
    with pytest.raises(FastsdError, match=r"net\.safetensors: .*conv_in.*\[16, 192, 3, 3\]"):
        sd1.load_controlnet(written("file", other, tmp_path))
