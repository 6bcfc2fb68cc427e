"""`accelerate` and `restore`: which components of a pipeline are answered, and what is refused."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from fastsd.diffusers.hosts import attach, detach, twin_of
from fastsd.diffusers.text import TextTwin
from fastsd.diffusers.twin import LIBRARIES, Twin, log
from fastsd.diffusers.unet import ControlNetTwin, UNetTwin
from fastsd.diffusers.vae import HalfTwin
from fastsd.errors import FastsdError

P = TypeVar("P")

PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionControlNetPipeline",
    "StableDiffusionControlNetImg2ImgPipeline",
    "StableDiffusionControlNetInpaintPipeline",
    "StableDiffusionInstructPix2PixPipeline",
    "StableDiffusionAdapterPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
    "StableDiffusionXLControlNetPipeline",
    "StableDiffusionXLControlNetImg2ImgPipeline",
    "StableDiffusionXLControlNetInpaintPipeline",
    "StableDiffusionXLInstructPix2PixPipeline",
    "StableDiffusionXLAdapterPipeline",
    "LatentConsistencyModelPipeline",
    "LatentConsistencyModelImg2ImgPipeline",
)
# The components that can be answered, and by what.
UNETS = ("unet", "controlnet")
TEXTS = ("text_encoder", "text_encoder_2")


def accelerate(pipe: P) -> P:
    """Let fastsd's networks compute what a diffusers pipeline's UNet, ControlNets, autoencoder and text encoders do.

    The pipeline, its modules and their weights stay the objects that they are: schedulers, callbacks, adapters, tiling
    and saving work as before, and the weights are in memory once. What fastsd lacks runs in diffusers' own code, which
    the logger `fastsd.diffusers` says once (docs/diffusers.md). Calling it again changes nothing.

    Args:
        pipe: a pipeline of one of the classes in `PIPELINES`, or of a class derived from one.

    Returns:
        `pipe`.

    Raises:
        FastsdError: another class, or a component that is compiled, quantised, offloaded, or on a device that fastsd
            does not run on; the pipeline is unchanged.
    """
    _check_class(pipe)
    found = list(_modules(pipe))
    for name, module in found:
        _check_module(name, module)
    twins: list[Twin] = []
    for name, module in found:
        twins += _twins(name, module)
    for twin in twins:
        if twin_of(twin.host) is None:
            attach(twin)
    return pipe


def restore(pipe: P) -> P:
    """Undo `accelerate`: every module has its own code and its own memory again, with the same numbers.

    Args:
        pipe: a pipeline that was accelerated; any other is left as it is.

    Returns:
        `pipe`.

    Raises:
        FastsdError: not a diffusers pipeline.
    """
    _check_class(pipe)
    for _, module in _modules(pipe):
        for part in module.modules():
            if twin_of(part) is not None:
                detach(part)
    return pipe


def _check_class(pipe: Any) -> None:
    """Refuse what is not a pipeline of a known class."""
    diffusers = sys.modules.get("diffusers")  # a pipeline of its comes with it
    if diffusers is None or not isinstance(pipe, diffusers.DiffusionPipeline):
        raise FastsdError("it should be a diffusers pipeline", argument="pipe", value=pipe)
    names = [kind.__name__ for kind in type(pipe).__mro__]
    if not set(names) & set(PIPELINES):
        raise FastsdError(
            f"fastsd has no networks for {names[0]}; it takes Stable Diffusion 1, 2 and XL: {', '.join(PIPELINES[:3])} "
            "and others that docs/diffusers.md lists",
            argument="pipe",
        )


def _modules(pipe: Any) -> Iterator[tuple[str, nn.Module]]:
    """The components that may be answered, by name; of several ControlNets each."""
    for name in (*UNETS, "vae", *TEXTS):
        module = getattr(pipe, name, None)
        if isinstance(module, nn.Module):
            nets = getattr(module, "nets", None) if name == "controlnet" else None
            if isinstance(nets, nn.ModuleList):
                yield from ((f"{name}.nets[{i}]", net) for i, net in enumerate(nets))
            else:
                yield name, module


def _check_module(name: str, module: nn.Module) -> None:
    """Refuse a component whose numbers or code are not what fastsd would read."""
    what = f"pipe.{name}"
    if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
        raise FastsdError("it is compiled by torch.compile; accelerate the pipeline that is not", argument=what)
    if getattr(module, "hf_quantizer", None) is not None or getattr(module, "is_quantized", False):
        raise FastsdError("it is quantised; load it in fp32, fp16 or bf16", argument=what)
    if hasattr(module, "_hf_hook") or any(hasattr(part, "_hf_hook") for part in module.modules()):
        raise FastsdError(
            "it is offloaded; call accelerate first and enable_model_cpu_offload() after it, or "
            "pipe.remove_all_hooks()",
            argument=what,
        )
    for parameter in module.parameters():
        data = parameter.data
        if type(data) is not torch.Tensor or not data.is_floating_point():
            raise FastsdError("it is quantised; load it in fp32, fp16 or bf16", argument=what)
        if data.device.type not in ("cpu", "cuda"):
            raise FastsdError(f"it is on {data.device}; fastsd runs on cpu and cuda", argument=what)


def _twins(name: str, module: nn.Module) -> list[Twin]:
    """What answers a component; nothing, said once, where fastsd has no such network."""
    own = type(module)  # a class derived from one of these may compute something else
    makers: dict[str, Callable[[], list[Twin]]] = {
        "UNet2DConditionModel": lambda: [UNetTwin(module, name)],
        "ControlNetModel": lambda: [ControlNetTwin(module, name)],
        "AutoencoderKL": lambda: [HalfTwin(module, half, name) for half in ("encoder", "decoder")],
        "CLIPTextModel": lambda: [TextTwin(module, name)],
        "CLIPTextModelWithProjection": lambda: [TextTwin(module, name)],
    }
    try:
        if own.__name__ in makers and own.__module__.split(".")[0] in LIBRARIES:
            return makers[own.__name__]()
        reason = f"fastsd has no {own.__name__}"
    except FastsdError as error:
        reason = error.message
    log.warning("%s runs in diffusers' own code: %s", name, reason)
    return []
