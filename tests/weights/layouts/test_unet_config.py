"""Every argument of diffusers' networks is read, is refused by its name, or changes nothing."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastsd.errors import FastsdError
from fastsd.weights.layouts import configs, unet_config
from fastsd.weights.layouts.unet_config import read_unet, write_unet
from tests.support.tiny import CLIP, UNET, VAE, XL

READ = {
    "unet": {
        *("sample_size", "in_channels", "out_channels", "flip_sin_to_cos", "freq_shift", "down_block_types"),
        *("mid_block_type", "up_block_types", "block_out_channels", "layers_per_block", "norm_num_groups", "norm_eps"),
        *("cross_attention_dim", "transformer_layers_per_block", "reverse_transformer_layers_per_block"),
        *("attention_head_dim", "num_attention_heads", "use_linear_projection", "addition_embed_type"),
        *("addition_time_embed_dim", "projection_class_embeddings_input_dim", "time_cond_proj_dim"),
        *("only_cross_attention", "mid_block_only_cross_attention", "time_embedding_dim"),
    },
    "vae": {
        *("in_channels", "out_channels", "latent_channels", "block_out_channels", "layers_per_block"),
        *("norm_num_groups", "mid_block_add_attention", "scaling_factor", "force_upcast"),
        *("down_block_types", "up_block_types", "latents_mean", "latents_std"),
    },
    "text_encoder": {
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("max_position_embeddings", "hidden_act", "layer_norm_eps", "projection_dim", "eos_token_id"),
    },
}
# Values other than the default, for which the network computes something else, or is another one.
REFUSED: dict[str, dict[str, Any]] = {
    "unet": {
        "_class_name": "UNetSpatioTemporalConditionModel",
        "act_fn": "gelu",
        "attention_type": "gated",
        "center_input_sample": True,
        "class_embed_type": "projection",
        "class_embeddings_concat": True,
        "conv_in_kernel": 1,
        "conv_out_kernel": 1,
        "cross_attention_norm": "layer_norm",
        "downsample_padding": 0,
        "dual_cross_attention": True,
        "encoder_hid_dim": 4096,
        "encoder_hid_dim_type": "text_proj",
        "mid_block_scale_factor": 2.0,
        "num_class_embeds": 1000,
        "resnet_out_scale_factor": 1.4,
        "resnet_skip_time_act": True,
        "resnet_time_scale_shift": "scale_shift",
        "time_embedding_act_fn": "silu",
        "time_embedding_type": "fourier",
        "timestep_post_act": "silu",
        "only_cross_attention": [True, False],
        "mid_block_only_cross_attention": True,
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "time_embedding_dim": 64,
        "addition_embed_type": "image",
        "layers_per_block": [1, 2],
        "cross_attention_dim": [32, 32],
        "transformer_layers_per_block": [[1, 1], 1],
        "reverse_transformer_layers_per_block": [1],
    },
    "vae": {
        "_class_name": "AsymmetricAutoencoderKL",
        "act_fn": "gelu",
        "down_block_types": ["AttnDownEncoderBlock2D", "DownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D", "AttnUpDecoderBlock2D"],
        "shift_factor": 0.1,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "text_encoder": {"hidden_act": "relu", "model_type": "t5", "architectures": ["T5EncoderModel"]},
}
NETWORKS: dict[str, tuple[Callable[[Path], Any], dict[str, Any], set[str]]] = {
    "unet": (read_unet, write_unet(UNET, 8), {*unet_config.FIXED, *unet_config.NO_EFFECT}),
    "vae": (configs.read_vae, configs.write_vae(VAE, 8), {*configs.VAE_FIXED, "sample_size"}),
    "text_encoder": (configs.read_clip, configs.write_clip(CLIP), set(configs.CLIP_NO_EFFECT)),
}


def arguments(network: str) -> set[str]:
    """The arguments of diffusers' or transformers' class."""
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    classes = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}
    if network in classes:
        return set(inspect.signature(classes[network].__init__).parameters) - {"self"}
    general = set(transformers.PretrainedConfig().to_dict())  # of every model: its type, its dtype, its labels
    return set(transformers.CLIPTextConfig().to_dict()) - general


@pytest.mark.parametrize("network", NETWORKS)
def test_every_argument_is_known(network: str) -> None:
    """A new version's argument has to be put into one of the tables."""
    others = NETWORKS[network][2]
    assert arguments(network) - READ[network] - others == set()
    assert READ[network] & others == set()


@pytest.mark.parametrize(("network", "key"), [(network, key) for network in REFUSED for key in REFUSED[network]])
def test_a_value_that_changes_the_result_is_refused_by_its_name(network: str, key: str, tmp_path: Path) -> None:
    read, written, _ = NETWORKS[network]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(written))
    read(path)
    path.write_text(json.dumps(written | {key: REFUSED[network][key]}))
    with pytest.raises(FastsdError, match=f"config.json: .*{key.removeprefix('reverse_')}"):
        read(path)


def test_every_fixed_argument_is_tried() -> None:
    assert set(unet_config.FIXED) <= set(REFUSED["unet"]) and set(configs.VAE_FIXED) <= set(REFUSED["vae"])


def test_values_that_mean_the_default_are_read(tmp_path: Path) -> None:
    """Old folders and training scripts write them out."""
    path = tmp_path / "config.json"
    same = {
        "only_cross_attention": [False, False],
        "mid_block_only_cross_attention": False,
        "time_embedding_dim": 4 * UNET.block_out_channels[0],
        "upcast_attention": True,
        "dropout": 0.1,
        "class_embed_type": None,
        "encoder_hid_dim": None,
        "reverse_transformer_layers_per_block": None,
    }
    path.write_text(json.dumps(write_unet(UNET, 8) | same))
    assert read_unet(path) == (UNET, 8)


def test_heads_divide_the_channels_where_there_is_attention(tmp_path: Path) -> None:
    """diffusers' own small models keep its default of 8 heads on levels of 4 channels that have no attention."""
    path, unet = tmp_path / "config.json", replace(UNET, **XL)
    path.write_text(json.dumps(write_unet(unet, 8) | {"attention_head_dim": [3, 4]}))
    assert read_unet(path)[0].num_attention_heads == (3, 4)
    path.write_text(json.dumps(write_unet(unet, 8) | {"attention_head_dim": [2, 3]}))
    with pytest.raises(FastsdError, match="each should be a multiple of its heads"):
        read_unet(path)
