"""Values without effect, of fields and options that A1111 acts on and fastsd does not."""

from __future__ import annotations

from typing import Any

# A1111's options with the values that change no pixels; fastsd has no others of them.
REFUSED_OPTIONS: dict[str, tuple[Any, ...]] = {
    "eta_ancestral": (1,),
    "eta_ddim": (0,),
    "face_restoration": (False,),
    "filter_nsfw": (False,),
    "forge_additional_modules": ([],),
    "img2img_color_correction": (False,),
    "img2img_fix_steps": (False,),
    "return_grid": (False,),
    "return_mask": (False,),
    "return_mask_composite": (False,),
    "s_churn": (0,),
    "s_min_uncond": (0,),
    "s_noise": (1,),
    "samples_format": ("png",),
    "sd_unet": ("Automatic", "None", ""),
    "sd_vae": ("Automatic", "None", ""),
    "tiling": (False,),
    "token_merging_ratio": (0,),
    "token_merging_ratio_hr": (0,),
    "token_merging_ratio_img2img": (0,),
    "upcast_attn": (False,),
}
# Beginnings of the names of options on files that A1111 writes, and on its page.
OPTIONS_OF_FILES = (
    "samples_",
    "grid_",
    "save_",
    "outdir_",
    "directories_",
    "jpeg_",
    "webp_",
    "live_preview",
    "show_progress",
)


def is_idle(value: Any, idle: tuple[Any, ...]) -> bool:
    """Whether a value is one of those without effect; forms and some languages send false as "false" and 0 as "0"."""
    if not isinstance(value, str) or value in idle:
        return value in idle
    text = value.strip().lower()
    try:
        return (False if text == "false" else float(text)) in idle
    except ValueError:
        return text in [one.lower() for one in idle if isinstance(one, str)]
