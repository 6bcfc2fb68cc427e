"""Every name that programs give a layer. Names are looked up whole in a table of these; underscores are never split."""

from __future__ import annotations

from collections.abc import Iterator

# The names of the text encoders in ComfyUI. SD 2's is clip_h; SDXL's refiner has only clip_g.
COMFY_CLIPS = {"text_encoder": ("clip_l", "clip_h"), "text_encoder_2": ("clip_g",)}

# The prefixes of kohya's trainer for the text encoders: of a model with one, and of SDXL with two.
KOHYA_TEXT = {"text_encoder": ("lora_te_", "lora_te1_"), "text_encoder_2": ("lora_te2_",)}


def kohya_name(network: str, module: str, original: str | None, xl: bool) -> str:
    """The name that kohya's trainer writes, one of `layer_names`: of SDXL's UNet it is the original layout's."""
    if network == "unet":
        return f"lora_unet_{(original if xl and original else module).replace('.', '_')}"
    return KOHYA_TEXT[network][-1 if xl else 0] + module.replace(".", "_")


def layer_names(network: str, module: str, original: str | None = None) -> Iterator[str]:
    """Every name of one layer.

    Args:
        network: "unet", "text_encoder" or "text_encoder_2".
        module: the layer's name in a diffusers folder.
        original: its name in the original layout, for the UNet.
    """
    yield f"{network}.{module}"
    flat = module.replace(".", "_")
    if network == "unet":
        yield from (f"lora_unet_{flat}", f"lycoris_{flat}", f"oft_unet_{flat}", module, f"base_model.model.{module}")
        if original is not None:
            yield f"lora_unet_{original.replace('.', '_')}"
            yield f"lycoris_{original.replace('.', '_')}"
            yield f"diffusion_model.{original}"
            yield f"model.diffusion_model.{original}"
        return
    short = module.removeprefix("text_model.")  # transformers 5 has no level text_model
    for prefix in KOHYA_TEXT[network]:
        yield prefix + flat
    yield f"{network}.{short}"
    for name in (module, short):
        yield name
        yield f"base_model.model.{name}"
    for clip in COMFY_CLIPS[network]:
        yield f"text_encoders.{clip}.transformer.{module}"
        yield f"{clip}.transformer.{module}"
