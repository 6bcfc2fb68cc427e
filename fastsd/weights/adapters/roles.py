"""The roles of tensors in adapter files: by which suffix of a key a role is known, and what its tensor looks like."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

Tensors = Mapping[str, torch.Tensor]  # by role


@dataclass(frozen=True)
class LayerOptions:
    """What PEFT's config says of a layer and its tensors do not.

    Attributes:
        feedforward: (IA)^3 scales the inputs, not the outputs and the bias.
        terms: of the series that replaces Cayley's transform in OFT; None: exact.
        bound: on the norm of OFT's generators (`coft`, `eps`); None: none.
    """

    feedforward: bool = False
    terms: int | None = None
    bound: float | None = None


NO_OPTIONS = LayerOptions()

# The role of a tensor in its layer, by suffix: of kohya and A1111; PEFT; diffusers before PEFT; LyCORIS; ComfyUI.
ROLES = {
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_mid.weight": "mid",
    "alpha": "alpha",
    "dora_scale": "magnitude",
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_B.bias": "bias_up_bias",
    "lora_embedding_A": "embedding_down",
    "lora_embedding_B": "embedding_up",
    "lora_magnitude_vector": "magnitude_of_outputs",
    "lora_magnitude_vector.weight": "magnitude_of_outputs",
    "ia3_l": "factors",
    "oft_R.weight": "oft_vectors",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "lora_linear_layer.down.weight": "down",
    "lora_linear_layer.up.weight": "up",
    **{f"hada_{part}": part for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{part}": f"kron_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    **{f"{part}.weight": f"glora_{part}" for part in ("a1", "a2", "b1", "b2")},
    "bm.weight": "glora_mid",
    "oft_blocks": "oft_blocks",
    "rescale": "rescale",
    "on_input": "on_input",
    "diff": "difference",
    "diff_b": "bias_difference",
    "w_norm": "difference",
    "b_norm": "bias_difference",
    "set_weight": "replacement",
}
# Suffixes that have these roles only in files of a PEFT config, or beside `on_input`: other files hold a model by them.
PEFT_ROLES = {
    "base_layer.weight": "base",
    "base_layer.bias": "bias_replacement",
    "weight": "replacement",
    "bias": "bias_replacement",
}
# The suffixes that kohya's trainer and LyCORIS write, and those that PEFT and diffusers do.
KOHYA_SUFFIXES = {role: suffix for suffix, role in reversed(ROLES.items())}
PEFT_SUFFIXES = KOHYA_SUFFIXES | {
    "down": "lora_A.weight",
    "up": "lora_B.weight",
    "magnitude": "lora_magnitude_vector",
}
BIAS = "bias_"  # begins the roles that change a bias; the rest is the role of a weight
SCALARS = ("alpha", "on_input")
# The least and the largest number of dimensions, where they are not 1 and 4.
DIMENSIONS = {
    "alpha": (0, 4),
    "on_input": (0, 1),
    **dict.fromkeys(("down", "up", "kron_w1", "kron_w2"), (2, 4)),
    **dict.fromkeys(("glora_a1", "glora_a2", "glora_b1", "glora_b2"), (2, 4)),
    **dict.fromkeys(("mid", "t1", "t2", "kron_t1", "kron_t2", "glora_mid"), (4, 4)),
    **dict.fromkeys(("w1_a", "w1_b", "w2_a", "w2_b", "kron_w1_a", "kron_w2_a"), (2, 2)),
    **dict.fromkeys(("kron_w1_b", "kron_w2_b"), (2, 4)),
    **dict.fromkeys(("embedding_down", "embedding_up", "oft_vectors"), (2, 2)),
    "oft_blocks": (3, 4),
    "up_bias": (1, 1),
}
# Adapters that fastsd lacks, by what their keys hold.
UNSUPPORTED = {
    r"\.(lora_E|ranknum)$": "AdaLoRA",
    r"\.boft_[Rs]$": "BOFT as PEFT writes it",
    r"\.(lambda_layer|[pq]_layer\.weight)$": "T-LoRA",
    r"\.vera_|vera_[AB]$": "VeRA",
    r"\.lora_diag": "KaSA",
    r"\.(hra_u|fourierft_|randlora_|vblora_|waveft_|c3a_|miss_|road_|shira_|psoft_|delora_)": "a newer kind of PEFT",
    r"\.reshape_weight$": "a change of a layer's shape",
    r"\.trainable_tokens_delta": "PEFT's trainable tokens",
    r"(^|\.)(hypernetwork|linear1|linear2)\.": "a hypernetwork",
    r"(^|\.)ip_adapter\.|^image_proj\.": "an IP-Adapter",
    r"(^|\.)(motion_modules|temporal_transformer)\.": "AnimateDiff's motion modules",
    r"^lllite_": "a ControlLLLite",
    r"(double_blocks|single_blocks|single_transformer_blocks|joint_blocks|transformer_blocks\.\d+\.attn\.add_)": (
        "an adapter for Flux or Stable Diffusion 3"
    ),
}
# Attention processors of diffusers before 0.20: `...attn1.processor.to_q_lora.down.weight`, and in text encoders
# `...to_q_lora.down.weight`.
PROCESSOR = re.compile(r"^(.*?)(?:\.processor)?\.to_(q|k|v|out)_lora\.(down|up)\.weight$")


def split_key(key: str, peft: bool = False) -> tuple[str, str | None]:
    """The layer's name and the tensor's role in a key; the role is None if no suffix is known.

    Args:
        key: of a tensor in an adapter file.
        peft: the file has a PEFT config; then whole weights and biases have roles too.
    """
    processor = PROCESSOR.match(key)
    if processor:
        parent, projection, role = processor.groups()
        text = parent.endswith("self_attn")
        out = "out_proj" if text else "to_out.0"
        layer = out if projection == "out" else (f"{projection}_proj" if text else f"to_{projection}")
        return f"{parent}.{layer}", role
    key = re.sub(r"\.default(?=\.(weight|bias)$|$)", "", key)  # PEFT's name for an adapter that has none
    parts = key.split(".")
    for count in (3, 2, 1):
        suffix = ".".join(parts[-count:])
        role = ROLES.get(suffix) or (PEFT_ROLES.get(suffix) if peft else None)
        if role is not None and len(parts) > count:
            return ".".join(parts[:-count]), role
    return key, None


def unsupported(keys: list[str]) -> str | None:
    """The kind of adapter that the keys belong to, if it is one that fastsd lacks."""
    for pattern, kind in UNSUPPORTED.items():
        if any(re.search(pattern, key) for key in keys):
            return kind
    return None
