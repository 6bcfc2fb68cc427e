"""Small random checkpoints, made without diffusers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from fastsd.components import Components
from fastsd.config import CLIPConfig, ControlNetConfig, SchedulerConfig, T2IAdapterConfig, UNetConfig, VAEConfig
from fastsd.model.clip import TextEncoder
from fastsd.model.controlnet import ControlNet
from fastsd.model.t2i_adapter import T2IAdapter
from fastsd.model.tokenizer import Tokenizer
from fastsd.model.unet import UNet
from fastsd.model.vae import AutoencoderKL
from fastsd.weights.layouts.names import sources, stored_form

UNET = UNetConfig(
    block_out_channels=(32, 64),
    layers_per_block=1,
    transformer_layers_per_block=(1, 0),
    num_attention_heads=(2, 4),
    cross_attention_dim=32,
    norm_num_groups=8,
)
VAE = VAEConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)
CLIP = CLIPConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)


XL: dict[str, Any] = {  # how SDXL's UNet differs, but for the width of its context
    "transformer_layers_per_block": (0, 2),
    "mid_transformer_layers": 2,
    "use_linear_projection": True,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24 + 6 * 8,
}


def sd1(unet: UNetConfig = UNET, vae: VAEConfig = VAE) -> Components:
    torch.manual_seed(0)
    return Components(
        unet=UNet(unet),
        vae=AutoencoderKL(vae),
        text_encoders=(TextEncoder(CLIP),),
        tokenizers=(Tokenizer(),),
        scheduler=SchedulerConfig(sampler="ddim"),
        sample_size=8,
        name="tiny",
    )


def sdxl(text_features: int = 64) -> Components:
    """`text_features`: the width of the UNet's context: 64 for both text encoders, 32 for the refiner's one."""
    torch.manual_seed(1)
    second = replace(CLIP, projection_dim=24, hidden_act="gelu")
    return Components(
        unet=UNet(replace(UNET, **XL, cross_attention_dim=text_features)),
        vae=AutoencoderKL(VAE),
        text_encoders=(TextEncoder(CLIP), TextEncoder(second)),
        tokenizers=(Tokenizer(), Tokenizer()),
        scheduler=SchedulerConfig(sampler="dpm++2m_sde", schedule="exponential", timestep_spacing="trailing"),
        sample_size=16,
        name="tiny-xl",
        zeros_for_empty_prompt=True,
    )


def all_weights(components: Components) -> dict[str, torch.Tensor]:
    """Every weight, by network and parameter."""
    modules = {"unet": components.unet, "vae": components.vae}
    modules |= {f"text{i}": encoder for i, encoder in enumerate(components.text_encoders)}
    return {f"{name}.{key}": value for name, module in modules.items() for key, value in module.state_dict().items()}


def controlnet(unet: UNetConfig, seed: int = 7) -> dict[str, torch.Tensor]:
    """A random ControlNet in diffusers' form, for a UNet whose autoencoder halves the image three times."""
    torch.manual_seed(seed)
    module = ControlNet(ControlNetConfig(replace(unet, in_channels=4), (8, 8, 8, 8)))
    stored = {}
    for _, parameter, parts in sources(module):
        for part in parts:
            rows = stored_form(part.key, parameter.detach()[part.rows], unet.use_linear_projection)
            if part.key.startswith(("controlnet_down_blocks.", "controlnet_mid_block.")) and rows.ndim == 2:
                rows = rows[:, :, None, None]
            stored[part.key] = rows.contiguous().clone()
    return stored


def t2i_adapter(unet: UNetConfig, seed: int = 8) -> dict[str, torch.Tensor]:
    """A random full T2I-Adapter of one block a level in diffusers' form, for a UNet with SD 1's levels."""
    torch.manual_seed(seed)
    widths = unet.block_out_channels
    module = T2IAdapter(T2IAdapterConfig(3, widths, 1, 8, False, tuple(level > 0 for level in range(len(widths)))))
    stored = {}
    for _, parameter, parts in sources(module):
        for part in parts:
            rows = stored_form(part.key, parameter.detach()[part.rows], False)
            stored["adapter." + part.key] = (rows[:, :, None, None] if rows.ndim == 2 else rows).contiguous().clone()
    return stored


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The same keys and, bit for bit, the same tensors in the same dtypes."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value), key
