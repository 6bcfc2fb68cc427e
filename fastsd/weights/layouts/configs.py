"""The JSON configs of a diffusers folder, converted to and from the dataclasses of `fastsd.config`."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from fastsd.config import (
    AutoencoderConfig,
    CLIPConfig,
    TAESDConfig,
    UNetConfig,
    VAEConfig,
)
from fastsd.weights.formats.json_file import ConfigReader


def read_unet(path: Path) -> tuple[UNetConfig, int]:
    """The UNet's config, and the side of the latents that it was trained on."""
    r = ConfigReader(path)
    channels = r.data.get("block_out_channels")
    if not isinstance(channels, list) or not 1 <= len(channels) <= 8:
        raise r.error("block_out_channels", "it should be a list of channel counts")
    levels = len(channels)
    attention = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}
    down = r.data.get("down_block_types", [])
    if not isinstance(down, list) or len(down) != levels or not all(d in list(attention) for d in down):
        raise r.error("down_block_types", f"it should list {levels} of DownBlock2D and CrossAttnDownBlock2D")
    mirrored = [name.replace("Down", "Up") for name in reversed(down)]
    if r.data.get("up_block_types") != mirrored:
        raise r.error("up_block_types", f"it should mirror down_block_types: {mirrored}")
    for key, value in _UNET_FIXED.items():
        r.one_of(key, (value,), value)

    depth = r.per_level("transformer_layers_per_block", levels, 1)
    heads = r.data.get("num_attention_heads")
    added = r.one_of("addition_embed_type", (None, "text_time"), None)
    config = UNetConfig(
        in_channels=r.get("in_channels", int, 4),
        out_channels=r.get("out_channels", int, 4),
        block_out_channels=r.per_level("block_out_channels", levels, None),
        layers_per_block=r.get("layers_per_block", int, 2),
        transformer_layers_per_block=tuple(n if attention[d] else 0 for n, d in zip(depth, down, strict=True)),
        mid_transformer_layers=depth[-1],
        # In these configs "attention_head_dim" is the number of heads (a misnomer kept for old files).
        num_attention_heads=r.per_level("num_attention_heads" if heads else "attention_head_dim", levels, 8),
        cross_attention_dim=r.get("cross_attention_dim", int, 1280),
        use_linear_projection=r.get("use_linear_projection", bool, False),
        norm_num_groups=r.get("norm_num_groups", int, 32),
        norm_eps=r.get("norm_eps", float, 1e-5),
        flip_sin_to_cos=r.get("flip_sin_to_cos", bool, True),
        freq_shift=r.get("freq_shift", int, 0),
        addition_time_embed_dim=r.get("addition_time_embed_dim", int, 0) if added else 0,
        projection_class_embeddings_input_dim=r.get("projection_class_embeddings_input_dim", int, 0) if added else 0,
        time_cond_proj_dim=r.get("time_cond_proj_dim", int, 0),
        skip=r.one_of("fastsd_skip", ("concat", "add"), "concat"),
    )
    for level_heads, width in zip(config.num_attention_heads, config.block_out_channels, strict=True):
        if width % level_heads or width % config.norm_num_groups:
            raise r.error("block_out_channels", "each should be a multiple of its heads and of norm_num_groups")
    if config.time_cond_proj_dim % 2 or config.time_cond_proj_dim == 2:
        raise r.error("time_cond_proj_dim", "it should be an even number from 4 on")
    return config, r.get("sample_size", int, 64)


# Keys that have the same value in every Stable Diffusion checkpoint; the models here support no other.
_UNET_FIXED = {
    "act_fn": "silu",
    "class_embed_type": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "only_cross_attention": False,
    "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
}


def write_unet(config: UNetConfig, sample_size: int) -> dict[str, Any]:
    """The JSON that `read_unet`, and diffusers, read back."""
    down = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in config.transformer_layers_per_block]
    depths = [depth or config.mid_transformer_layers for depth in config.transformer_layers_per_block]
    depths[-1] = config.mid_transformer_layers
    added = bool(config.addition_time_embed_dim)
    result: dict[str, Any] = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": sample_size,
        "down_block_types": down,
        "up_block_types": [name.replace("Down", "Up") for name in reversed(down)],
        "transformer_layers_per_block": depths,
        "attention_head_dim": list(config.num_attention_heads),
        "addition_embed_type": "text_time" if added else None,
        "addition_time_embed_dim": config.addition_time_embed_dim if added else None,
        "projection_class_embeddings_input_dim": config.projection_class_embeddings_input_dim if added else None,
        "block_out_channels": list(config.block_out_channels),
        **{key: value for key, value in _UNET_FIXED.items() if value is not None},
    }
    for name in ("in_channels", "out_channels", "layers_per_block", "cross_attention_dim", "use_linear_projection"):
        result[name] = getattr(config, name)
    for name in ("norm_num_groups", "norm_eps", "flip_sin_to_cos", "freq_shift"):
        result[name] = getattr(config, name)
    if config.time_cond_proj_dim:
        result["time_cond_proj_dim"] = config.time_cond_proj_dim
    if config.skip != "concat":
        result["fastsd_skip"] = config.skip  # diffusers has no such model
    return result


def read_autoencoder(path: Path) -> AutoencoderConfig:
    """The config of an autoencoder: Stable Diffusion's or TAESD."""
    return read_taesd(path) if ConfigReader(path).data.get("_class_name") == TINY else read_vae(path)


def write_autoencoder(config: AutoencoderConfig, sample_size: int) -> dict[str, Any]:
    """The JSON that `read_autoencoder`, and diffusers, read back."""
    return write_taesd(config) if isinstance(config, TAESDConfig) else write_vae(config, sample_size)


def read_taesd(path: Path) -> TAESDConfig:
    """TAESD's config. Its `latent_magnitude` and `latent_shift` are for storing latents as images."""
    r = ConfigReader(path)
    blocks = {name: r.data.get(name) for name in ("num_encoder_blocks", "num_decoder_blocks")}
    for name, counts in blocks.items():
        if not isinstance(counts, list) or not 1 <= len(counts) <= 8:
            raise r.error(name, "it should be a list of 1 to 8 block counts")
    levels = len(r.data["num_decoder_blocks"])
    widths = [r.per_level(f"{side}_block_out_channels", levels, None) for side in ("encoder", "decoder")]
    if len(set(widths[0] + widths[1])) != 1:
        raise r.error("decoder_block_out_channels", "all levels of encoder and decoder should have the same width")
    for key, value in _TAESD_FIXED.items():
        r.one_of(key, (value,), value)
    return TAESDConfig(
        latent_channels=r.get("latent_channels", int, 4),
        block_out_channels=widths[0],
        num_encoder_blocks=r.per_level("num_encoder_blocks", levels, None),
        num_decoder_blocks=r.per_level("num_decoder_blocks", levels, None),
        scaling_factor=r.get("scaling_factor", float, 1.0),
    )


TINY = "AutoencoderTiny"
_TAESD_FIXED = {
    "act_fn": "relu",
    "in_channels": 3,
    "out_channels": 3,
    "shift_factor": 0.0,
    "upsample_fn": "nearest",
    "upsampling_scaling_factor": 2,
}


def write_taesd(config: TAESDConfig) -> dict[str, Any]:
    """The JSON that `read_taesd`, and diffusers, read back."""
    widths = list(config.block_out_channels)
    result: dict[str, Any] = {name: getattr(config, name) for name in ("latent_channels", "scaling_factor")}
    result |= {"force_upcast": False, "_class_name": TINY}
    result |= {"encoder_block_out_channels": widths, "decoder_block_out_channels": widths}
    result |= {name: list(getattr(config, name)) for name in ("num_encoder_blocks", "num_decoder_blocks")}
    return result | _TAESD_FIXED


def read_vae(path: Path) -> VAEConfig:
    """The autoencoder's config."""
    r = ConfigReader(path)
    channels = r.data.get("block_out_channels")
    if not isinstance(channels, list) or not 1 <= len(channels) <= 8:
        raise r.error("block_out_channels", "it should be a list of channel counts")
    for key, value in {"act_fn": "silu", "use_quant_conv": True, "use_post_quant_conv": True}.items():
        r.one_of(key, (value,), value)
    r.one_of("shift_factor", (None,), None)
    return VAEConfig(
        in_channels=r.get("in_channels", int, 3),
        out_channels=r.get("out_channels", int, 3),
        latent_channels=r.get("latent_channels", int, 4),
        block_out_channels=r.per_level("block_out_channels", len(channels), None),
        layers_per_block=r.get("layers_per_block", int, 1),
        norm_num_groups=r.get("norm_num_groups", int, 32),
        mid_block_attention=r.get("mid_block_add_attention", bool, True),
        scaling_factor=r.get("scaling_factor", float, 0.18215),
        force_upcast=r.get("force_upcast", bool, False),
    )


def write_vae(config: VAEConfig, sample_size: int) -> dict[str, Any]:
    """The JSON that `read_vae`, and diffusers, read back."""
    levels = len(config.block_out_channels)
    result = {f.name: getattr(config, f.name) for f in fields(config) if f.name != "norm_eps"}
    result["mid_block_add_attention"] = result.pop("mid_block_attention")
    return result | {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": list(config.block_out_channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "sample_size": sample_size,
    }


def read_clip(path: Path) -> CLIPConfig:
    """A text encoder's config."""
    r = ConfigReader(path)
    base = CLIPConfig()
    numbers = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    architectures = str(r.data.get("architectures"))
    eos = r.get("eos_token_id", int, base.eos_token_id)
    config = CLIPConfig(
        **{name: r.get(name, int, getattr(base, name)) for name in (*numbers, "max_position_embeddings")},
        hidden_act=r.one_of("hidden_act", ("quick_gelu", "gelu"), base.hidden_act),
        layer_norm_eps=r.get("layer_norm_eps", float, base.layer_norm_eps),
        projection_dim=r.get("projection_dim", int, 512) if "WithProjection" in architectures else 0,
        eos_token_id=eos,
        eos_is_largest_id=eos == 2,
    )
    if config.hidden_size % config.num_attention_heads:
        raise r.error("num_attention_heads", f"it should divide hidden_size = {config.hidden_size}")
    return config


def write_clip(config: CLIPConfig) -> dict[str, Any]:
    """The JSON that `read_clip`, and transformers, read back."""
    result = {f.name: getattr(config, f.name) for f in fields(config) if f.name != "eos_is_largest_id"}
    name = "CLIPTextModelWithProjection" if config.projection_dim else "CLIPTextModel"
    result["projection_dim"] = config.projection_dim or config.hidden_size
    return result | {"architectures": [name], "model_type": "clip_text_model"}
