"""The networks of a checkpoint on a fake GPU: without values, so nothing is read and nothing takes memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from bench.dryrun.device import DEVICE
from bench.dryrun.record import DryRun
from bench.families import ModelFamily
from fastsd.components import Components
from fastsd.config import TAESDConfig
from fastsd.model.clip import TextEncoder
from fastsd.model.taesd import TAESD
from fastsd.model.tokenizer import Tokenizer
from fastsd.model.unet import UNet
from fastsd.model.vae import AutoencoderKL
from fastsd.runtime.devices import autoencoder_dtype

HALF = torch.float16


def on_gpu(kind: Any, config: Any, dtype: torch.dtype = HALF) -> Any:
    """A network on the fake GPU with the memory layout of a loaded one."""
    with torch.device("meta"):
        module: nn.Module = kind(config)
    state = {}
    for name, parameter in module.named_parameters():
        layout = torch.channels_last if parameter.ndim == 4 else torch.contiguous_format
        state[name] = torch.empty(parameter.shape, dtype=dtype, device=DEVICE, memory_format=layout)
    module.load_state_dict(state, strict=True, assign=True)
    return module.eval().requires_grad_(False)


def components_of(run: DryRun, family: ModelFamily, in_channels: int = 4, tiny_vae: bool = False) -> Components:
    """A checkpoint of the family on the fake GPU."""
    encoders = tuple(on_gpu(TextEncoder, config) for config in family.text)
    of_vae = autoencoder_dtype(torch.float16, DEVICE, family.vae.force_upcast)
    components = Components(
        unet=on_gpu(UNet, replace(family.unet, in_channels=in_channels)),
        vae=on_gpu(TAESD, TAESDConfig()) if tiny_vae else on_gpu(AutoencoderKL, family.vae, of_vae),
        text_encoders=encoders,
        tokenizers=tuple(Tokenizer() for _ in encoders),
        scheduler=family.scheduler,
        sample_size=family.size // family.vae.downscale,
        name=family.title,
        zeros_for_empty_prompt=len(encoders) > 1,
    )
    for name, network in components.networks():
        run.name(name, network)
    return components
