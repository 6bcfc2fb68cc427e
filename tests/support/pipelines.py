"""A pipeline with tiny random networks, and the folder that holds such a checkpoint."""

from __future__ import annotations

import torch

from fastsd.components import Components
from fastsd.config import CLIPConfig, SchedulerConfig, UNetConfig, VAEConfig
from fastsd.model.clip import TextEncoder
from fastsd.model.tokenizer import Tokenizer
from fastsd.model.unet import UNet
from fastsd.model.vae import AutoencoderKL
from fastsd.pipeline import Pipeline


def tiny_components(in_channels: int = 4, dtype: torch.dtype = torch.float32, steps: int = 3) -> Components:
    """A checkpoint of random weights that generates 64x64 images in `steps` steps by default."""
    torch.manual_seed(0)
    unet = UNetConfig(
        in_channels=in_channels,
        block_out_channels=(32, 64),
        layers_per_block=1,
        transformer_layers_per_block=(1, 0),
        num_attention_heads=(2, 4),
        cross_attention_dim=32,
        norm_num_groups=8,
    )
    vae = VAEConfig(block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4)
    clip = CLIPConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    return Components(
        unet=UNet(unet).to(dtype),
        vae=AutoencoderKL(vae).to(dtype),
        text_encoders=(TextEncoder(clip).to(dtype),),
        tokenizers=(Tokenizer(),),
        scheduler=SchedulerConfig(sampler="ddim"),
        sample_size=8,
        name="tiny",
        defaults={"num_inference_steps": steps},
    )


def tiny_pipeline(in_channels: int = 4, dtype: torch.dtype = torch.float32) -> Pipeline:
    return Pipeline(tiny_components(in_channels, dtype), torch.device("cpu"), dtype)
