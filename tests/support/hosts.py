"""diffusers' pipelines for `fastsd.accelerate`: one of each class, calls of it, and what its modules are made of."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image

import fastsd
from tests.support.families import Families, disturbed, make_unet

PHOTO = Image.fromarray(np.random.RandomState(3).randint(0, 256, (64, 64, 3), dtype=np.uint8))
MASK = Image.fromarray(np.kron(np.eye(2, dtype=np.uint8) * 255, np.ones((32, 32), dtype=np.uint8)))
TOLERANCE = 1e-4  # of pixels in [0, 1]: some steps of fp32, whose sums are in another order

# By class: the family whose components it has, and what its call takes beside prompt and seed.
CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "StableDiffusionPipeline": ("sd1", {}),
    "StableDiffusionImg2ImgPipeline": ("sd1", {"image": PHOTO}),
    "StableDiffusionInpaintPipeline": ("inpainting", {"image": PHOTO, "mask_image": MASK}),
    "StableDiffusionControlNetPipeline": ("sd1", {"image": PHOTO}),
    "StableDiffusionControlNetImg2ImgPipeline": ("sd1", {"image": PHOTO, "control_image": PHOTO}),
    "StableDiffusionControlNetInpaintPipeline": (
        "sd1",
        {"image": PHOTO, "mask_image": MASK, "control_image": PHOTO},
    ),
    "StableDiffusionInstructPix2PixPipeline": ("pix2pix", {"image": PHOTO}),
    "StableDiffusionAdapterPipeline": ("sd1", {"image": PHOTO}),
    "StableDiffusionXLPipeline": ("sdxl", {}),
    "StableDiffusionXLImg2ImgPipeline": ("sdxl", {"image": PHOTO}),
    "StableDiffusionXLInpaintPipeline": ("sdxl", {"image": PHOTO, "mask_image": MASK}),
    "StableDiffusionXLControlNetPipeline": ("sdxl", {"image": PHOTO}),
    "StableDiffusionXLControlNetImg2ImgPipeline": ("sdxl", {"image": PHOTO, "control_image": PHOTO}),
    "StableDiffusionXLControlNetInpaintPipeline": (
        "sdxl",
        {"image": PHOTO, "mask_image": MASK, "control_image": PHOTO},
    ),
    "StableDiffusionXLInstructPix2PixPipeline": ("sdxl pix2pix", {"image": PHOTO}),
    "StableDiffusionXLAdapterPipeline": ("sdxl", {"image": PHOTO}),
    "LatentConsistencyModelPipeline": ("sd1", {}),
    "LatentConsistencyModelImg2ImgPipeline": ("sd1", {"image": PHOTO}),
}


def make(families: Families, name: str) -> Any:
    """A pipeline of a class, with the modules of its family."""
    import diffusers

    components = dict(families.pipelines[CALLS[name][0]].components)
    if "ControlNet" in name:
        components["controlnet"] = make_controlnet(components["unet"])
    if "Adapter" in name:
        xl = "XL" in name
        kind, factor = ("full_adapter_xl", 16) if xl else ("full_adapter", 8)
        components["adapter"] = disturbed(
            diffusers.T2IAdapter(channels=[32, 64], num_res_blocks=1, downscale_factor=factor, adapter_type=kind)
        )
    if "LatentConsistency" in name:
        components["scheduler"] = diffusers.LCMScheduler.from_config(components["scheduler"].config)
        components["unet"] = make_unet(time_cond_proj_dim=16)
    if "XL" not in name:
        components["requires_safety_checker"] = False
    if name == "StableDiffusionAdapterPipeline":
        components.pop("image_encoder", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = getattr(diffusers, name)(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_controlnet(unet: Any) -> Any:
    """A ControlNet for a UNet, whose residuals are not 0."""
    import diffusers

    net = diffusers.ControlNetModel.from_unet(
        unet, conditioning_channels=3, conditioning_embedding_out_channels=(8, 8, 8, 8), load_weights_from_unet=False
    )
    return disturbed(net)


def pixels(pipe: Any, name: str = "StableDiffusionPipeline", **changes: Any) -> torch.Tensor:
    """The images of a short call, in [0, 1]."""
    call: dict[str, Any] = {
        "num_inference_steps": 2,
        "output_type": "pt",
        "generator": torch.Generator().manual_seed(1),
    }
    call |= CALLS[name][1] | changes
    if "image" not in call:
        call = {"height": 64, "width": 64} | call
    if "Img2Img" in name:
        call.setdefault("strength", 0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.as_tensor(pipe("a cat", **call).images)


@contextmanager
def accelerated(pipe: Any) -> Iterator[Any]:
    """The pipeline, accelerated inside."""
    fastsd.accelerate(pipe)
    try:
        yield pipe
    finally:
        fastsd.restore(pipe)


def networks(pipe: Any) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


def anatomy(pipe: Any) -> dict[tuple[str, str], Any]:
    """Identity, class and attributes' names of every module; identity, layout and storage of every parameter."""
    found: dict[tuple[str, str], Any] = {}
    for component, network in networks(pipe).items():
        for name, module in network.named_modules():
            # By identity: an accelerated class is equal to its own.
            found[component, name] = (id(module), id(type(module)), sorted(module.__dict__))
        for name, tensor in network.named_parameters():
            alone = tensor.data.untyped_storage().nbytes() == tensor.nbytes
            found[component, name] = (id(tensor), tensor.stride(), tensor.dtype, tensor.requires_grad, alone)
    return found


def weights(pipe: Any) -> dict[tuple[str, str], torch.Tensor]:
    """A copy of every weight and buffer."""
    return {
        (component, name): tensor.clone()
        for component, network in networks(pipe).items()
        for name, tensor in network.state_dict().items()
    }


def save_lora(unet: Any, folder: Any, rank: int, targets: list[str], **config: Any) -> Any:
    """Write a random LoRA for a UNet, as diffusers loads it; returns the folder."""
    import copy

    import diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(sum(map(ord, folder.name)))
    adapted = copy.deepcopy(unet)
    adapted.add_adapter(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, **config))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
    diffusers.StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(adapted))
    return folder
