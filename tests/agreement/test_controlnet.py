"""ControlNets give what diffusers' give, by themselves and in whole images, from every file form."""

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
from tests.support.families import Families, disturbed

TOLERANCE = 1e-4  # of whole images; of the network by itself 1e-5
FAMILIES = ("sd1", "sd2", "sdxl", "inpainting")
HINTS = (8, 12, 16, 24)
SETTINGS: dict[str, Any] = {"num_inference_steps": 5, "guidance_scale": 4.0}


@pytest.fixture(scope="module")
def nets(families: Families, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Two of diffusers' ControlNets for each family, saved in `<family>-<i>`."""
    import diffusers

    torch.manual_seed(5)
    made = {}
    for family in FAMILIES:
        unet = families.pipelines["sd1" if family == "inpainting" else family].unet
        made[family] = [
            disturbed(diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=HINTS))
            for _ in range(2)
        ]
        for i, net in enumerate(made[family]):
            net.save_pretrained(families.folder / f"controlnet-{family}-{i}")
    return made


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


def theirs(families: Families, kind: str, family: str, nets: Any) -> Any:
    import diffusers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        extra = {} if family == "sdxl" else {"safety_checker": None}
        pipe = getattr(diffusers, kind).from_pretrained(families.folder / family, controlnet=nets, **extra)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: Any, **arguments: Any) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = pipe("a cat on a mat", output_type="latent", generator=[torch.Generator().manual_seed(3)], **arguments)
    return found.images


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("family", FAMILIES[:3])
def test_what_is_added_to_the_unet(families: Families, nets: Any, family: str) -> None:
    their, pipe = nets[family][0], ours(families, family)
    net = loaded(pipe, families, family)
    torch.manual_seed(0)
    x, photo = torch.randn(2, 4, 8, 8), torch.rand(2, 3, 64, 64)
    time, text = torch.tensor([7.0, 801.0]), torch.randn(2, 5, net.config.cross_attention_dim)
    added = {}
    ours_added = None
    if family == "sdxl":
        from fastsd.model.unet import AddedConditioning

        pooled, sizes = torch.randn(2, 24), torch.rand(2, 6) * 64
        added = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}
        ours_added = AddedConditioning(pooled, sizes)
    with torch.no_grad():
        down, middle = their(x, time, text, photo, conditioning_scale=0.7, return_dict=False, **added)
        found = net.denoise(
            x.permute(0, 2, 3, 1),
            net.embed_time(time, ours_added),
            net.project_context(text),
            net.embed_hint(photo.permute(0, 2, 3, 1)),
            torch.tensor([0.7]),
        )
    for one, wanted in zip(found, (*down, middle), strict=True):
        assert float((one.permute(0, 3, 1, 2) - wanted).norm() / wanted.norm()) < 1e-5


@pytest.mark.parametrize("family", FAMILIES[:3])
def test_text_to_image(families: Families, nets: Any, family: str, photos: list[Image.Image]) -> None:
    kind = "StableDiffusionXLControlNetPipeline" if family == "sdxl" else "StableDiffusionControlNetPipeline"
    pipe = ours(families, family)
    arguments = {"negative_prompt": "blue", **SETTINGS}
    wanted = run(
        theirs(families, kind, family, nets[family][0]),
        image=photos[0],
        controlnet_conditioning_scale=0.8,
        height=64,
        width=64,
        **arguments,
    )
    control = Control(loaded(pipe, families, family), photos[0], weight=0.8)
    found = pipe("a cat on a mat", controls=[control], seed=3, output_type="latent", **arguments).images
    assert error(found, wanted) < TOLERANCE
    without = pipe("a cat on a mat", seed=3, output_type="latent", **arguments).images
    assert error(without, wanted) > 100 * TOLERANCE  # the ControlNet matters


@pytest.mark.parametrize(("start", "end"), [((0.0, 0.4), (0.6, 1.0)), ((0.2, 0.0), (0.8, 0.1))])
def test_several_with_their_parts_of_the_steps(
    families: Families, nets: Any, photos: list[Image.Image], start: tuple[float, float], end: tuple[float, float]
) -> None:
    wanted = run(
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
    found = pipe("a cat on a mat", controls=controls, seed=3, output_type="latent", **SETTINGS).images
    assert error(found, wanted) < TOLERANCE


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_image_to_image(families: Families, nets: Any, family: str, photos: list[Image.Image]) -> None:
    xl = "XL" if family == "sdxl" else ""
    wanted = run(
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
    found = pipe("a cat on a mat", controls=[control], **arguments).images
    assert error(found, wanted) < TOLERANCE


@pytest.mark.parametrize("family", ["sd1", "inpainting"])
def test_inpainting(families: Families, nets: Any, family: str, photos: list[Image.Image], mask: Image.Image) -> None:
    arguments = {"image": photos[1], "mask_image": mask, "strength": 0.8, **SETTINGS}
    wanted = run(
        theirs(families, "StableDiffusionControlNetInpaintPipeline", family, nets[family][0]),
        control_image=photos[0],
        controlnet_conditioning_scale=1.0,
        height=64,
        width=64,
        **arguments,
    )
    pipe = ours(families, family)
    control = Control(loaded(pipe, families, family), photos[0])
    found = pipe("a cat on a mat", controls=[control], seed=3, output_type="latent", **arguments).images
    assert error(found, wanted) < TOLERANCE


def original(tensors: dict[str, torch.Tensor], layers: int, levels: int) -> dict[str, torch.Tensor]:
    """diffusers' names to the original layout's, by counting blocks as Zhang's code appends them."""
    inner = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }
    blocks = {"conv_in.": "input_blocks.0.0."}
    number = 1
    for level in range(levels):
        for layer in range(layers):
            blocks[f"down_blocks.{level}.resnets.{layer}."] = f"input_blocks.{number}.0."
            blocks[f"down_blocks.{level}.attentions.{layer}."] = f"input_blocks.{number}.1."
            number += 1
        if level < levels - 1:
            blocks[f"down_blocks.{level}.downsamplers.0.conv."] = f"input_blocks.{number}.0.op."
            number += 1
    blocks |= {"mid_block.resnets.0.": "middle_block.0.", "mid_block.attentions.0.": "middle_block.1."}
    blocks |= {"mid_block.resnets.1.": "middle_block.2.", "controlnet_mid_block.": "middle_block_out.0."}
    blocks |= {"time_embedding.linear_1.": "time_embed.0.", "time_embedding.linear_2.": "time_embed.2."}
    blocks |= {"add_embedding.linear_1.": "label_emb.0.0.", "add_embedding.linear_2.": "label_emb.0.2."}
    blocks |= {f"controlnet_down_blocks.{i}.": f"zero_convs.{i}.0." for i in range(number)}
    blocks |= {f"controlnet_cond_embedding.blocks.{i}.": f"input_hint_block.{2 * i + 2}." for i in range(6)}
    blocks |= {"controlnet_cond_embedding.conv_in.": "input_hint_block.0."}
    blocks |= {"controlnet_cond_embedding.conv_out.": "input_hint_block.14."}
    found = {}
    for key, tensor in tensors.items():
        head = next(head for head in blocks if key.startswith(head))
        rest = key.removeprefix(head)
        if ".resnets." in head:
            layer_name, kind = rest.rsplit(".", 1)
            rest = f"{inner[layer_name]}.{kind}"
        found[blocks[head] + rest] = tensor.contiguous()
    return found


@pytest.mark.parametrize("prefix", ["", "control_model."])
@pytest.mark.parametrize("family", FAMILIES[:3])
def test_single_files(families: Families, nets: Any, tmp_path: Path, family: str, prefix: str) -> None:
    """Both layouts, with and without the prefix of whole training checkpoints: the same weights."""
    pipe = ours(families, family)
    wanted = loaded(pipe, families, family).state_dict()
    stored = load_file(families.folder / f"controlnet-{family}-0" / "diffusion_pytorch_model.safetensors")
    for name, tensors in (("diffusers", stored), ("original", original(stored, layers=1, levels=2))):
        file = tmp_path / f"{name}.safetensors"
        save_file({prefix + key: tensor for key, tensor in tensors.items()}, file)
        found = pipe.load_controlnet(file).state_dict()
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_channels_in_the_other_order(families: Families, nets: Any, tmp_path: Path) -> None:
    """What a folder calls bgr reads the mirrored channels."""
    import diffusers

    torch.manual_seed(6)
    unet = families.pipelines["sd1"].unet
    net = disturbed(
        diffusers.ControlNetModel.from_unet(
            unet, controlnet_conditioning_channel_order="bgr", conditioning_embedding_out_channels=HINTS
        )
    )
    net.save_pretrained(tmp_path / "bgr")
    found = ours(families, "sd1").load_controlnet(tmp_path / "bgr")
    photo = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        wanted = net.controlnet_cond_embedding(photo.flip(1))
        hint = found.embed_hint(photo.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert float((hint - wanted).norm() / wanted.norm()) < 1e-5
