"""The JSON configs of a diffusers folder, converted to and from the dataclasses of `fastsd.config`."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

from fastsd.config import AutoencoderConfig, CLIPConfig, TAESDConfig, VAEConfig
from fastsd.weights.formats.json_file import ConfigReader


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


# Values that every autoencoder here has; the models support no other.
VAE_FIXED: dict[str, Any] = {
    "act_fn": "silu",
    "shift_factor": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
}
# Arguments of transformers' CLIPTextConfig that change nothing: of training, or of the tokenizer.
CLIP_NO_EFFECT = ("attention_dropout", "bos_token_id", "initializer_factor", "initializer_range", "pad_token_id")


def read_vae(path: Path, data: dict[str, Any] | None = None) -> VAEConfig:
    """The autoencoder's config. `data`: what the file would hold, for a config that is in memory."""
    r = ConfigReader(path, data)
    r.one_of("_class_name", ("AutoencoderKL", TINY), "AutoencoderKL")
    channels = r.data.get("block_out_channels")
    if not isinstance(channels, list) or not 1 <= len(channels) <= 8:
        raise r.error("block_out_channels", "it should be a list of channel counts")
    for key, value in VAE_FIXED.items():
        r.one_of(key, (value,), value)
    for key, block in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if r.data.get(key) not in (None, [block] * len(channels)):
            raise r.error(key, f"it should list {len(channels)} of {block}")
    return VAEConfig(
        in_channels=r.get("in_channels", int, 3),
        out_channels=r.get("out_channels", int, 3),
        latent_channels=r.get("latent_channels", int, 4),
        block_out_channels=r.per_level("block_out_channels", len(channels), None),
        layers_per_block=r.get("layers_per_block", int, 1),
        norm_num_groups=r.get("norm_num_groups", int, 32),
        mid_block_attention=r.get("mid_block_add_attention", bool, True),
        scaling_factor=r.get("scaling_factor", float, 0.18215),
        latents_mean=_by_channel(r, "latents_mean"),
        latents_std=_by_channel(r, "latents_std"),
        force_upcast=r.get("force_upcast", bool, False),
    )


def _by_channel(r: ConfigReader, key: str) -> tuple[float, ...] | None:
    """A number for each channel of the latent, or None. diffusers uses mean and standard deviation only together."""
    found, channels = r.data.get(key), r.get("latent_channels", int, 4)
    if found is None or r.data.get("latents_mean") is None or r.data.get("latents_std") is None:
        return None
    good = isinstance(found, list) and len(found) == channels and all(type(v) in (int, float) for v in found)
    if not good or not all(math.isfinite(v) and (v > 0 or key == "latents_mean") for v in found):
        raise r.error(key, f"it should be a list of latent_channels = {channels} numbers")
    return tuple(float(v) for v in found)


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


def read_clip(path: Path, data: dict[str, Any] | None = None) -> CLIPConfig:
    """A text encoder's config. `data`: what the file would hold, for a config that is in memory."""
    r = ConfigReader(path, data)
    base = CLIPConfig()
    numbers = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    r.one_of("model_type", ("clip_text_model",), "clip_text_model")
    architectures = str(r.data.get("architectures"))
    if r.data.get("architectures") is not None and "CLIPTextModel" not in architectures:
        raise r.error("architectures", "it should be CLIPTextModel or CLIPTextModelWithProjection")
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
