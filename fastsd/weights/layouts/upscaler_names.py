"""What kind of upscaler a file is, by its keys."""

from __future__ import annotations

import re
from collections.abc import Collection

# Kinds that fastsd does not have, with patterns that must all be found; families that share keys come in this order.
OTHERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("SPSR", (r"^model\.1\.sub\.0\.RDB1\.", r"^b_fea_conv\.")),
    ("MMRealSR", (r"^am_list\.",)),
    ("SRResNet", (r"^model\.1\.sub\.0\.res\.",)),
    ("HAT", (r"\.conv_block\.cab\.",)),
    ("ATD", (r"^layers\.0\.residual_group\.td$",)),
    ("Swin2SR", (r"^layers\.0\.residual_group\.blocks\.0\.norm1\.", r"^patch_embed\.proj\.", r"logit_scale|cpb_mlp")),
    ("SRFormer", (r"^layers\.0\.residual_group\.blocks\.0\.attn\.aligned_relative_position",)),
    ("SwinIR", (r"^layers\.0\.residual_group\.blocks\.0\.attn\.relative_position",)),
    ("RGT", (r"^before_RG\.", r"^layers\.0\.blocks\.0\.gamma$")),
    ("DAT", (r"^before_RG\.",)),
    ("DRCT", (r"^layers\.0\.swin1\.",)),
    ("GRL", (r"^layers\.0\.blocks\.0\.attn\.window_attn\.",)),
    ("CRAFT", (r"^layers\.0\.residual_group\.(hf|sr)_blocks\.",)),
    ("OmniSR", (r"^residual_layer\.0\.residual_layer\.",)),
    ("SPAN", (r"^block_1\.c1_r\.",)),
    ("RealCUGAN", (r"^unet1\.conv1\.",)),
    ("SCUNet", (r"^m_head\.0\.", r"^m_tail\.")),
    ("GFPGAN", (r"^stylegan_decoder\.",)),
    ("CodeFormer", (r"^position_emb$", r"^idx_pred_layer\.")),
    ("PLKSR", (r"^feats\.1\.lk\.",)),
    ("MoSR", (r"^gblocks\.0\.",)),
    ("SAFMN", (r"^feats\.0\.safm\.",)),
    ("RCAN or EDSR", (r"^head\.\d", r"^body\.0\.body\.0\.")),
    ("NAFNet", (r"^intro\.", r"^middle_blks\.")),
    ("Uformer", (r"^encoderlayer_0\.",)),
    ("Restormer", (r"^encoder_level1\.",)),
)
OLD_BLOCK = r"^model\.1\.sub\.\d+\.RDB\d\.conv\d\.0\.weight$"
ANY = r"^(params(_ema)?\.)?(conv_first|upconv\d|HRconv)\.|residual_group\.|^model\.1\.sub\."
NEW_BLOCK = r"^(body\.\d+\.rdb|RRDB_trunk\.\d+\.RDB)\d\.conv\d\.weight$"


def has_key(keys: Collection[str], pattern: str) -> bool:
    """Whether a key matches a regular expression."""
    return any(re.search(pattern, key) for key in keys)


def other_kind(keys: Collection[str]) -> str | None:
    """The kind of network, where it is an upscaler or restorer that fastsd does not have."""
    return next((name for name, patterns in OTHERS if all(has_key(keys, one) for one in patterns)), None)


def upscaler_kind(keys: Collection[str]) -> str | None:
    """ "ESRGAN" or "compact", the kinds that fastsd has; None for any other file."""
    if other_kind(keys) is not None:
        return None
    if has_key(keys, OLD_BLOCK) or has_key(keys, NEW_BLOCK):
        return "ESRGAN"
    return "compact" if {"body.0.weight", "body.1.weight", "body.2.weight"} <= set(keys) else None


def describe_upscaler(keys: Collection[str]) -> str | None:
    """What `fastsd inspect` says of an upscaler's file; None for any other file."""
    own, other = upscaler_kind(keys), other_kind(keys)
    if own is not None:
        return f"an upscaler ({own}); use it with fastsd upscale, or --hires-upscaler"
    if other is None:
        return "an upscaler, which fastsd does not read" if has_key(keys, ANY) else None
    return f"an upscaler or restorer ({other}), which fastsd does not read"
