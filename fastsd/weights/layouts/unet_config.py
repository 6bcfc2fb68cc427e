"""A UNet's `config.json`, converted to and from `UNetConfig`.

Every argument of diffusers' UNet2DConditionModel is read here, is refused where it would change the result, or changes
nothing (`NO_EFFECT`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastsd.config import Depth, UNetConfig
from fastsd.errors import FastsdError
from fastsd.weights.formats.json_file import ConfigReader

# Values that every UNet here has; the models support no other. A missing key means diffusers' default, which these are.
FIXED: dict[str, Any] = {
    "act_fn": "silu",
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "mid_block_scale_factor": 1,
    "num_class_embeds": None,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "time_embedding_act_fn": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
}
# Arguments that change nothing here: of training; of a text embedding that is refused; attention is always in fp32.
NO_EFFECT = ("dropout", "addition_embed_type_num_heads", "upcast_attention")

DOWN = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}  # whether a level has attention
UP = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}
MID = {"UNetMidBlock2DCrossAttn": 2, "UNetMidBlock2D": 1, None: 0}  # its residual blocks
UP_DEPTHS = "reverse_transformer_layers_per_block"  # lowest level first


def read_unet(path: Path, data: dict[str, Any] | None = None) -> tuple[UNetConfig, int]:
    """The UNet's config, and the side of the latents that it was trained on.

    Args:
        path: its file.
        data: what the file would hold, for a config that is in memory.

    Raises:
        FastsdError: malformed, or a value that the models do not support; it names the key.
    """
    r = ConfigReader(path, data)
    r.one_of("_class_name", ("UNet2DConditionModel",), "UNet2DConditionModel")
    channels = r.data.get("block_out_channels")
    if not isinstance(channels, list) or not 1 <= len(channels) <= 8:
        raise r.error("block_out_channels", "it should be a list of channel counts")
    levels = len(channels)
    for key, value in FIXED.items():
        r.one_of(key, (value,), value)
    _check_fixed(r, levels)
    added = r.one_of("addition_embed_type", (None, "text_time"), None)
    heads = r.data.get("num_attention_heads")
    config = UNetConfig(
        in_channels=r.get("in_channels", int, 4),
        out_channels=r.get("out_channels", int, 4),
        block_out_channels=r.per_level("block_out_channels", levels, None),
        **_read_depths(r, levels, r.get("layers_per_block", int, 2)),
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
    for level, width in enumerate(config.block_out_channels):
        attends = level == levels - 1 or any((*config.down_depths(level), *config.up_depths(level)))
        if width % config.norm_num_groups or (attends and width % config.num_attention_heads[level]):
            raise r.error("block_out_channels", "each should be a multiple of its heads and of norm_num_groups")
    if config.time_cond_proj_dim % 2 or config.time_cond_proj_dim == 2:
        raise r.error("time_cond_proj_dim", "it should be an even number from 4 on")
    if r.data.get("time_embedding_dim") not in (None, config.time_embed_dim):
        raise r.error("time_embedding_dim", f"it should be 4 times the first level's channels, {config.time_embed_dim}")
    return config, r.get("sample_size", int, 64)


def _check_fixed(r: ConfigReader, levels: int) -> None:
    """Refuse values of arguments that may be a list, or whose null means something."""
    only = r.data.get("only_cross_attention")
    if only not in (None, False, [False] * levels):
        raise r.error("only_cross_attention", "it should be False")
    if r.data.get("mid_block_only_cross_attention") not in (None, False):
        raise r.error("mid_block_only_cross_attention", "it should be None or False")
    if "norm_num_groups" in r.data and r.data["norm_num_groups"] is None:
        raise r.error("norm_num_groups", "it should be a number of groups")


def _read_depths(r: ConfigReader, levels: int, layers: int) -> dict[str, Any]:
    """The parts of a `UNetConfig` that say where its residual blocks and transformers are."""
    down = _attends(r, "down_block_types", DOWN, levels, None)
    up = _attends(r, "up_block_types", UP, levels, down)
    mid = r.data.get("mid_block_type", "UNetMidBlock2DCrossAttn")
    if not isinstance(mid, str | None) or mid not in MID:
        raise r.error("mid_block_type", "it should be UNetMidBlock2DCrossAttn, UNetMidBlock2D or null")
    key = "transformer_layers_per_block"
    given = _depths(r, key, levels, layers)
    reverse = r.data.get(UP_DEPTHS) is not None
    expanding = tuple(reversed(_depths(r, UP_DEPTHS, levels, layers + 1))) if reverse else given
    if not reverse and any(isinstance(depth, tuple) for depth, attends in zip(given, up, strict=True) if attends):
        raise r.error(key, f"with lists in it, {UP_DEPTHS} should give those of the up blocks")
    middle = (given[-1] if isinstance(given[-1], int) else given[-1][0]) if mid == "UNetMidBlock2DCrossAttn" else 0
    attending = [*zip(given, down, strict=True), *zip(expanding, up, strict=True)]
    if any(depth == 0 for depth, attends in attending if attends) or (MID[mid] == 2 and not middle):
        raise r.error(key, "a level with attention should have at least 1")
    contracting, expanding = (
        tuple(depth if attends else 0 for depth, attends in zip(depths, levels_with, strict=True))
        for depths, levels_with in ((given, down), (expanding, up))
    )
    return {
        "layers_per_block": layers,
        "transformer_layers_per_block": contracting,
        "up_transformer_layers": () if expanding == contracting else expanding,
        "mid_transformer_layers": middle,
        "mid_resnets": MID[mid],
    }


def _attends(r: ConfigReader, key: str, kinds: dict[str, bool], levels: int, default: list[bool] | None) -> list[bool]:
    """Whether each level has attention, the finest level's first; the file lists up blocks from the lowest level."""
    names = r.data.get(key)
    if not isinstance(names, list) or len(names) != levels or not all(name in list(kinds) for name in names):
        raise r.error(key, f"it should list {levels} of {' and '.join(kinds)}")
    found = [kinds[name] for name in names]
    return found if default is None else found[::-1]


def _depths(r: ConfigReader, key: str, levels: int, layers: int) -> tuple[Depth, ...]:
    """An integer for all levels, or a list of one for each level or of a list with one for each layer."""
    value = r.data.get(key)
    value = 1 if value is None else value
    entries = value if isinstance(value, list) else [value] * levels
    found = [_depth(entry, layers) for entry in entries]
    if len(found) != levels or None in found:
        raise r.error(
            key, f"it should be an integer from 1 to 24, or a list of {levels}, of such integers or lists of {layers}"
        )
    return tuple(depth for depth in found if depth is not None)


def _depth(entry: Any, layers: int) -> Depth | None:
    if type(entry) is int:
        return entry if 0 <= entry <= 24 else None
    if not isinstance(entry, list) or len(entry) != layers or not all(type(n) is int and 1 <= n <= 24 for n in entry):
        return None
    return shortened(entry)


def shortened(depths: Sequence[int]) -> Depth:
    """A level's depths as one number, where they are equal."""
    return depths[0] if len(set(depths)) == 1 else tuple(depths)


def write_unet(config: UNetConfig, sample_size: int) -> dict[str, Any]:
    """The JSON that `read_unet`, and diffusers, read back.

    Raises:
        FastsdError: diffusers' configs cannot say that the lowest level has this depth.
    """
    contracting = config.transformer_layers_per_block
    expanding = config.up_transformer_layers or contracting
    added = bool(config.addition_time_embed_dim)
    result: dict[str, Any] = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": sample_size,
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in contracting],
        "mid_block_type": next(name for name, resnets in MID.items() if resnets == config.mid_resnets),
        "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(expanding)],
        "transformer_layers_per_block": _write_depths(config),
        "attention_head_dim": list(config.num_attention_heads),
        "addition_embed_type": "text_time" if added else None,
        "addition_time_embed_dim": config.addition_time_embed_dim if added else None,
        "projection_class_embeddings_input_dim": config.projection_class_embeddings_input_dim if added else None,
        "block_out_channels": list(config.block_out_channels),
        "only_cross_attention": False,
        **{key: value for key, value in FIXED.items() if value is not None},
    }
    if config.up_transformer_layers:
        result[UP_DEPTHS] = [list(d) if isinstance(d, tuple) else d or 1 for d in reversed(expanding)]
    for name in ("in_channels", "out_channels", "layers_per_block", "cross_attention_dim", "use_linear_projection"):
        result[name] = getattr(config, name)
    for name in ("norm_num_groups", "norm_eps", "flip_sin_to_cos", "freq_shift"):
        result[name] = getattr(config, name)
    if config.time_cond_proj_dim:
        result["time_cond_proj_dim"] = config.time_cond_proj_dim
    if config.skip != "concat":
        result["fastsd_skip"] = config.skip  # diffusers has no such model
    return result


def _write_depths(config: UNetConfig) -> list[Any]:
    """The contracting path's depths; the last one is the lowest level's too, in diffusers."""
    depths, middle = list(config.transformer_layers_per_block), config.mid_transformer_layers
    if config.mid_resnets == 2:
        last = depths[-1] or middle
        depths[-1] = last
        if middle != (last if isinstance(last, int) else last[0]) or not middle:
            raise FastsdError(
                f"a folder cannot store that the UNet's lowest level has depth {middle} below one of depth {last}"
            )
    return [list(depth) if isinstance(depth, tuple) else depth or middle or 1 for depth in depths]
