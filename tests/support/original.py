"""Tiny checkpoints in the original layout, written by counting blocks as the original code builds them.

This writer shares nothing with `fastsd.weights.layouts.ldm_names`; a test compares it with diffusers' converters too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from fastsd.components import Components
from fastsd.config import CLIPConfig, SchedulerConfig, UNetConfig, VAEConfig
from fastsd.model.clip import TextEncoder
from fastsd.model.tokenizer import Tokenizer
from fastsd.model.unet import UNet
from fastsd.model.vae import AutoencoderKL

Tensors = dict[str, torch.Tensor]

CLIP = CLIPConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=1)
OPENCLIP = replace(CLIP, hidden_act="gelu")
PROJECTING = replace(OPENCLIP, projection_dim=32)
VAE = VAEConfig(block_out_channels=(32, 32, 64), layers_per_block=1)
XL_VAE = replace(VAE, scaling_factor=0.13025, force_upcast=True)
SD2_UNET = UNetConfig(
    block_out_channels=(64, 128),
    layers_per_block=1,
    transformer_layers_per_block=(1, 0),
    num_attention_heads=(1, 2),
    cross_attention_dim=64,
    use_linear_projection=True,
)
XL_UNET = UNetConfig(
    block_out_channels=(64, 128),
    layers_per_block=2,
    transformer_layers_per_block=(0, 2),
    mid_transformer_layers=2,
    num_attention_heads=(1, 2),
    cross_attention_dim=128,
    use_linear_projection=True,
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=32 + 6 * 8,
)


@dataclass(frozen=True)
class TinyFamily:
    """One family at a tiny size.

    Attributes:
        name: in messages and in `fastsd inspect`.
        texts: for each text encoder its folder, its prefix in a single file, and its config.
        prediction: of its models that do not inpaint.
        truncated: its files also hold a last layer and a projection that the model does not use.
        spacing: of its timesteps; None: its scheduler does not state it.
    """

    name: str
    unet: UNetConfig
    texts: tuple[tuple[str, str, CLIPConfig], ...]
    sampler: str
    vae: VAEConfig = VAE
    prediction: str = "epsilon"
    truncated: bool = False
    spacing: str | None = None


FAMILIES = {
    "sd1": TinyFamily(
        "SD 1",
        UNetConfig(
            block_out_channels=(32, 64, 64),
            transformer_layers_per_block=(1, 1, 0),
            num_attention_heads=(8, 8, 8),
            cross_attention_dim=64,
        ),
        (("text_encoder", "cond_stage_model.transformer.", CLIP),),
        "pndm",
    ),
    "sd2": TinyFamily(
        "SD 2",
        SD2_UNET,
        (("text_encoder", "cond_stage_model.model.", OPENCLIP),),
        "ddim",
        prediction="v_prediction",
        truncated=True,
    ),
    "sd-turbo": TinyFamily(
        "SD-Turbo",
        SD2_UNET,
        (("text_encoder", "conditioner.embedders.0.model.", OPENCLIP),),
        "euler",
        truncated=True,
        spacing="trailing",
    ),
    "sdxl": TinyFamily(
        "SDXL",
        XL_UNET,
        (
            ("text_encoder", "conditioner.embedders.0.transformer.", CLIP),
            ("text_encoder_2", "conditioner.embedders.1.model.", PROJECTING),
        ),
        "euler",
        XL_VAE,
        spacing="leading",
    ),
    "refiner": TinyFamily(
        "SDXL refiner",
        replace(XL_UNET, cross_attention_dim=64, layers_per_block=1, projection_class_embeddings_input_dim=32 + 5 * 8),
        (("text_encoder_2", "conditioner.embedders.0.model.", PROJECTING),),
        "euler",
        XL_VAE,
        spacing="leading",
    ),
}
SMALLER = {  # SDXL's UNet without some of its blocks
    "SSD-1B": replace(
        XL_UNET, up_transformer_layers=(0, (2, 1, 3)), transformer_layers_per_block=(0, 2),
        mid_transformer_layers=0, mid_resnets=1,
    ),
    "Vega": replace(XL_UNET, transformer_layers_per_block=(0, 1), mid_transformer_layers=0, mid_resnets=1),
}  # fmt: skip
INPUTS = {"": 4, "inpainting": 9, "InstructPix2Pix": 8, "depth": 5}  # channels that a UNet reads, by kind
WITH_KINDS = [
    *FAMILIES,
    *(f"{family} inpainting" for family in FAMILIES),
    *("sd1 InstructPix2Pix", "sdxl InstructPix2Pix", "sd2 depth"),
]


def components(family: str, kind: str = "") -> Components:
    """A tiny random model of a family and a kind of `INPUTS`.

    Noise on every parameter, because an initial 0 or 1 could hide a mistake.
    """
    torch.manual_seed(sorted(FAMILIES).index(family))
    tiny = FAMILIES[family]
    configs = [config for _, _, config in tiny.texts]
    result = Components(
        unet=UNet(replace(tiny.unet, in_channels=INPUTS[kind])),
        vae=AutoencoderKL(tiny.vae),
        text_encoders=tuple(TextEncoder(config) for config in configs),
        tokenizers=tuple(
            Tokenizer() if config.hidden_act == "quick_gelu" else Tokenizer(pad="!") for config in configs
        ),
        scheduler=SchedulerConfig(
            sampler=tiny.sampler,
            prediction_type="epsilon" if kind else tiny.prediction,
            timestep_spacing=tiny.spacing,
        ),
        sample_size=8,
        zeros_for_empty_prompt=family == "sdxl",
        aesthetic_score=family == "refiner",
    )
    for module in (result.unet, result.vae, *result.text_encoders):
        for parameter in module.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
    return result


def file_tensors(folder: Path, family: str) -> Tensors:
    """The tensors of a folder in the form of a single file."""
    tiny = FAMILIES[family]
    unet = unet_tensors(load_file(folder / "unet/diffusion_pytorch_model.safetensors"), tiny.unet)
    tensors = {f"model.diffusion_model.{key}": value for key, value in unet.items()}
    tensors |= {
        f"first_stage_model.{key}": value
        for key, value in vae_tensors(load_file(folder / "vae/diffusion_pytorch_model.safetensors"), 3).items()
    }
    for name, prefix, config in tiny.texts:
        text = load_file(folder / name / "model.safetensors")
        if config.hidden_act == "gelu":
            text = openclip_tensors(text, complete=tiny.truncated)
        tensors |= {prefix + key: value.contiguous() for key, value in text.items()}
    return tensors


def encoder_names(layers: int, levels: int) -> dict[str, str]:
    """The original names of the modules that a UNet and a ControlNet share, which is all but a UNet's second half.

    Counts blocks in the order in which the original code appends them.
    """
    names = {"conv_in": "input_blocks.0.0"}
    names |= {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
    names |= {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
    names |= {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2"}
    names["mid_block.attentions.0"] = "middle_block.1"
    count = 1
    for level in range(levels):
        for layer in range(layers):
            names[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{count}.0"
            names[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{count}.1"
            count += 1
        if level < levels - 1:
            names[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{count}.0.op"
            count += 1
    return names


def unet_tensors(tensors: Tensors, config: UNetConfig) -> Tensors:
    """A UNet's tensors by their original keys."""
    levels = len(config.block_out_channels)
    names = encoder_names(config.layers_per_block, levels) | {"conv_norm_out": "out.0", "conv_out": "out.2"}
    count = 0
    for level in range(levels):
        attends = bool(config.up_depths(levels - 1 - level))
        for layer in range(config.layers_per_block + 1):
            block = [f"up_blocks.{level}.resnets.{layer}"]
            block += [f"up_blocks.{level}.attentions.{layer}"] if attends else []
            for index, module in enumerate(block):
                names[module] = f"output_blocks.{count}.{index}"
            if layer == config.layers_per_block and level < levels - 1:
                names[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{count}.{len(block)}.conv"
            count += 1
    return rename(tensors, names)


def controlnet_tensors(tensors: Tensors, layers: int, levels: int) -> Tensors:
    """A ControlNet's tensors by their keys in Zhang's code."""
    names = encoder_names(layers, levels) | {"controlnet_mid_block": "middle_block_out.0"}
    names |= {f"controlnet_down_blocks.{i}": f"zero_convs.{i}.0" for i in range((layers + 1) * levels)}
    names |= {f"controlnet_cond_embedding.blocks.{i}": f"input_hint_block.{2 * i + 2}" for i in range(6)}
    names |= {"controlnet_cond_embedding.conv_in": "input_hint_block.0"}
    names |= {"controlnet_cond_embedding.conv_out": "input_hint_block.14"}
    return rename(tensors, names)


def rename(tensors: Tensors, names: dict[str, str]) -> Tensors:
    """Replace the modules' names, and those of the layers in their residual blocks."""
    inside = [("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("norm2", "out_layers.0"), ("conv2", "out_layers.3")]
    inside += [("time_emb_proj", "emb_layers.1"), ("conv_shortcut", "skip_connection")]
    result = {}
    for key, tensor in tensors.items():
        module = next(name for name in names if key.startswith(f"{name}."))
        rest = key[len(module) :]
        if ".resnets." in module:
            for new, old in inside:
                rest = rest.replace(f".{new}.", f".{old}.")
        result[names[module] + rest] = tensor
    assert len(result) == len(tensors)
    return result


def vae_tensors(tensors: Tensors, levels: int) -> Tensors:
    """An autoencoder's tensors by their original keys."""
    result = {}
    for key, tensor in tensors.items():
        for level in range(levels):
            key = key.replace(f"decoder.up_blocks.{level}.", f"decoder.up.{levels - 1 - level}.")
            key = key.replace(f"encoder.down_blocks.{level}.", f"encoder.down.{level}.")
        for new, old in (
            (".resnets.", ".block."),
            ("mid_block.block.0", "mid.block_1"),
            ("mid_block.block.1", "mid.block_2"),
            ("mid_block.attentions.0", "mid.attn_1"),
            ("group_norm", "norm"),
            ("to_q", "q"),
            ("to_k", "k"),
            ("to_v", "v"),
            ("to_out.0", "proj_out"),
            ("conv_shortcut", "nin_shortcut"),
            ("downsamplers.0", "downsample"),
            ("upsamplers.0", "upsample"),
            ("conv_norm_out", "norm_out"),
        ):
            key = key.replace(new, old)
        result[key] = tensor[:, :, None, None] if "attn_1" in key and tensor.ndim == 2 else tensor
    return result


def openclip_tensors(tensors: Tensors, complete: bool) -> Tensors:
    """A text encoder's tensors in OpenCLIP's form.

    Args:
        tensors: by the keys of a folder.
        complete: add the last layer and the projection, which SD 2 does not use and its folder does not hold.
    """
    result: Tensors = {"logit_scale": torch.tensor(4.6)}
    layers = 1 + max(int(key.split(".")[3]) for key in tensors if ".layers." in key)
    result["token_embedding.weight"] = tensors["text_model.embeddings.token_embedding.weight"]
    result["positional_embedding"] = tensors["text_model.embeddings.position_embedding.weight"]
    for kind in ("weight", "bias"):
        result[f"ln_final.{kind}"] = tensors[f"text_model.final_layer_norm.{kind}"]
        for i in range(layers):
            new, old = f"text_model.encoder.layers.{i}", f"transformer.resblocks.{i}"
            qkv = [tensors[f"{new}.self_attn.{name}_proj.{kind}"] for name in "qkv"]
            result[f"{old}.attn.in_proj_{kind}"] = torch.cat(qkv)
            result[f"{old}.attn.out_proj.{kind}"] = tensors[f"{new}.self_attn.out_proj.{kind}"]
            for n in (1, 2):
                result[f"{old}.ln_{n}.{kind}"] = tensors[f"{new}.layer_norm{n}.{kind}"]
            result[f"{old}.mlp.c_fc.{kind}"] = tensors[f"{new}.mlp.fc1.{kind}"]
            result[f"{old}.mlp.c_proj.{kind}"] = tensors[f"{new}.mlp.fc2.{kind}"]
    if complete:
        last = {key: torch.randn_like(value) for key, value in result.items() if f".resblocks.{layers - 1}." in key}
        result |= {key.replace(f".{layers - 1}.", f".{layers}.", 1): value for key, value in last.items()}
        result["text_projection"] = torch.randn(64, 64)
    else:
        result["text_projection"] = tensors["text_projection.weight"].T
    return result
