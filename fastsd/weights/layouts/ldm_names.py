"""Key names of the original layout (Rombach et al.'s code, OpenCLIP, Stability's generative-models), as tables.

Each `*_key` function maps a diffusers key, which is also the name of a parameter here, to its key in a single file.
Loading looks up the file's key for each parameter; converting writes it. So each name is stated once.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from fastsd.config import UNetConfig, VAEConfig

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."

_UNET_FIXED = {
    "time_embedding.cond_proj": "time_embed.cond_proj",  # latent consistency models only; no name in the original code
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_RESAMPLER = {"downsamplers": "downsample", "upsamplers": "upsample"}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPENCLIP_FIXED = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}
_OPENCLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


@dataclass(frozen=True)
class OriginalKey:
    """A key of the original layout, and the part of its tensor that is meant.

    Attributes:
        key: without the network's prefix.
        third: the third of the rows to use, from a matrix that stacks q, k and v; None: all rows.
        transposed: the file stores the transpose.
    """

    key: str
    third: int | None = None
    transposed: bool = False


def unet_table(config: UNetConfig) -> dict[str, str]:
    """The UNet's modules, down to residual blocks and transformers, and their names in a single file."""
    table = dict(_UNET_FIXED)
    levels, n = len(config.block_out_channels), config.layers_per_block
    for level in range(levels):
        down, up = f"down_blocks.{level}", f"up_blocks.{level}"
        for layer in range(n):
            table[f"{down}.resnets.{layer}"] = f"input_blocks.{1 + level * (n + 1) + layer}.0"
            table[f"{down}.attentions.{layer}"] = f"input_blocks.{1 + level * (n + 1) + layer}.1"
        table[f"{down}.downsamplers.0.conv"] = f"input_blocks.{(level + 1) * (n + 1)}.0.op"
        for layer in range(n + 1):
            table[f"{up}.resnets.{layer}"] = f"output_blocks.{level * (n + 1) + layer}.0"
            table[f"{up}.attentions.{layer}"] = f"output_blocks.{level * (n + 1) + layer}.1"
        # The upsampler comes after the level's last residual block, or after the transformer that follows it.
        index = 2 if config.up_depths(levels - 1 - level) else 1
        table[f"{up}.upsamplers.0.conv"] = f"output_blocks.{level * (n + 1) + n}.{index}.conv"
    return table


def unet_key(table: dict[str, str], key: str) -> OriginalKey:
    """The original key of the UNet's `key`, by `unet_table`."""
    for head, rest in _splits(key):
        if head in table:
            inner = rest if ".resnets." not in head else _renamed(rest, _UNET_RESNET)
            return OriginalKey(f"{table[head]}.{inner}")
    raise KeyError(key)


def vae_key(config: VAEConfig, key: str) -> OriginalKey:
    """The original key of the autoencoder's `key`. The original numbers the decoder's levels from the finest."""
    parts = key.split(".")
    if parts[0] not in ("encoder", "decoder"):
        return OriginalKey(key)  # quant_conv, post_quant_conv
    side, block, rest = parts[0], parts[1], ".".join(parts[2:])
    if block == "conv_norm_out":
        return OriginalKey(f"{side}.norm_out.{rest}")
    if block == "mid_block":
        kind, index, inner = rest.split(".", 2)
        if kind == "attentions":
            return OriginalKey(f"{side}.mid.attn_1.{_renamed(inner, _VAE_ATTENTION)}")
        return OriginalKey(f"{side}.mid.block_{int(index) + 1}.{_renamed(inner, {'conv_shortcut': 'nin_shortcut'})}")
    if block in ("down_blocks", "up_blocks"):
        level, kind, index, inner = rest.split(".", 3)
        number = int(level) if block == "down_blocks" else len(config.block_out_channels) - 1 - int(level)
        parent = f"{side}.{block.removesuffix('_blocks')}.{number}"
        if kind == "resnets":
            return OriginalKey(f"{parent}.block.{index}.{_renamed(inner, {'conv_shortcut': 'nin_shortcut'})}")
        return OriginalKey(f"{parent}.{_RESAMPLER[kind]}.{inner}")
    return OriginalKey(key)  # conv_in, conv_out


def linear_projection(keys: Container[str], prefix: str) -> bool:
    """Whether a file holds OpenCLIP's projection as a layer's weight, which is its transpose (SSD-1B, Vega)."""
    return f"{prefix}text_projection.weight" in keys and f"{prefix}text_projection" not in keys


def openclip_key(key: str, linear: bool = False) -> OriginalKey:
    """The key of a text encoder's `key` in OpenCLIP's layout. `linear`: see `linear_projection`."""
    if key == "text_projection.weight":
        return OriginalKey(key) if linear else OriginalKey("text_projection", transposed=True)
    if key in _OPENCLIP_FIXED:
        return OriginalKey(_OPENCLIP_FIXED[key])
    layer, inner = key.removeprefix("text_model.encoder.layers.").split(".", 1)
    parent = f"transformer.resblocks.{layer}"
    module, _, kind = inner.rpartition(".")
    if module in _QKV:
        return OriginalKey(f"{parent}.attn.in_proj_{kind}", third=_QKV.index(module))
    return OriginalKey(f"{parent}.{_OPENCLIP_LAYER[module]}.{kind}")


def _splits(key: str) -> list[tuple[str, str]]:
    """Every way to split a key at a dot, longest head first."""
    parts = key.split(".")
    return [(".".join(parts[:i]), ".".join(parts[i:])) for i in range(len(parts) - 1, 0, -1)]


def _renamed(key: str, table: dict[str, str]) -> str:
    head, _, kind = key.rpartition(".")
    return f"{table.get(head, head)}.{kind}"
