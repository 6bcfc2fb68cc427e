"""Whether the networks of a checkpoint fit together, and what it is if fastsd does not run it.

Folders and single files share these checks: `check_fit` once their configs are known, before any weight is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastsd.config import AutoencoderConfig, CLIPConfig, UNetConfig
from fastsd.errors import FastsdError

Shapes = Mapping[str, tuple[int, ...]]

# Models of other kinds in the original layout, by a part of a key; they have a UNet of the same names.
_OTHER_KEYS = {
    ".time_stack.": "Stable Video Diffusion, which makes videos",
    "low_res_scheduler.": "Stable Diffusion's x4 upscaler",
    "diffusion_model.label_emb.weight": "Stable Diffusion's x4 upscaler",
    "embedder.model.visual.": "SD 2 unCLIP, whose prompt is an image",
    "cc_projection.": "Zero123, whose prompt is an image",
    "cond_stage_model.model.visual.": "a model whose prompt is an image",
    "cond_stage_model.vision_model.": "a model whose prompt is an image",
    "cond_stage_model.transformer.vision_model.": "a model whose prompt is an image",
    "diffusion_model.position_net.": "GLIGEN, which places objects in boxes",
    ".motion_modules.": "AnimateDiff, which makes videos",
    "diffusion_model.encoder_hid_proj.": "Kolors, whose text encoder is a language model",
    "diffusion_model.clip_txt_mapper.": "Stable Cascade",
}
# Pipelines of other kinds in diffusers, by the class in model_index.json; `*` stands for any ending.
_OTHER_CLASSES = {
    "StableDiffusionUpscalePipeline": "Stable Diffusion's x4 upscaler",
    "StableDiffusionLatentUpscalePipeline": "the latent upscaler",
    "StableVideoDiffusion*": "Stable Video Diffusion, which makes videos",
    "AnimateDiff*": "AnimateDiff, which makes videos",
    "TextToVideo*": "a model that makes videos",
    "StableUnCLIP*": "SD 2 unCLIP, whose prompt is an image",
    "StableDiffusionImageVariation*": "a model whose prompt is an image",
    "StableDiffusionGLIGEN*": "GLIGEN, which places objects in boxes",
    "StableDiffusionLDM3D*": "LDM3D, which makes depth maps too",
    "Marigold*": "Marigold, which measures depth or normals in an image",
    "DepthNormalEstimation*": "GeoWizard, which measures depth and normals in an image",
    "StableDiffusion3*": "Stable Diffusion 3",
    "StableCascade*": "Stable Cascade",
    "Wuerstchen*": "Wuerstchen",
    "Flux*": "Flux",
    "Kolors*": "Kolors, whose text encoder is a language model",
    "Kandinsky*": "Kandinsky",
    "PixArt*": "PixArt",
    "Sana*": "Sana",
    "HunyuanDiT*": "Hunyuan-DiT",
    "AuraFlow*": "AuraFlow",
    "IF*": "DeepFloyd IF, which works on pixels",
    "LDMTextToImage*": "the first latent diffusion model, whose text encoder is BERT",
}
# What a UNet is that reads so many channels and gives four.
_OTHER_WIDTHS = {
    3: "a model that works on pixels",
    6: "a model that works on pixels",
    7: "Stable Diffusion's x4 upscaler, which also reads a small image",
    12: "a model that reads two more latents, such as a virtual try-on",
    13: "a model that reads a mask and two more latents, such as a virtual try-on",
    16: "a model for latents of 16 channels",
}


def refuse_other_keys(path: Path, shapes: Iterable[str]) -> None:
    """Refuse a single file that holds a model of another kind, by its name.

    Raises:
        FastsdError: it says what the file is.
    """
    keys = list(shapes)
    for part, name in _OTHER_KEYS.items():
        if any(part in key for key in keys):
            raise FastsdError(f"it is {name}; fastsd does not run it", path=path)


def refuse_other_class(path: Path, index: Mapping[str, Any]) -> None:
    """Refuse a folder whose model_index.json names a pipeline of another kind.

    Raises:
        FastsdError: it says what the folder is.
    """
    found = str(index.get("_class_name"))
    for pattern, name in _OTHER_CLASSES.items():
        if found == pattern or (pattern.endswith("*") and found.startswith(pattern[:-1])):
            raise FastsdError(f"it is {name} ({found}); fastsd does not run it", path=path)


def check_fit(
    path: Path, unet: UNetConfig, vae: AutoencoderConfig | None, texts: Sequence[CLIPConfig], scored: bool
) -> None:
    """Refuse networks that do not fit together, before their weights are read.

    Args:
        path: for messages.
        unet: the UNet's config.
        vae: the autoencoder's; None: the file holds none, and whoever adds one checks its latents.
        texts: the text encoders', in the order in which their features are concatenated.
        scored: the added conditioning holds an aesthetic score (SDXL's refiner).

    Raises:
        FastsdError: one line that names what does not fit and what would.
    """
    width = sum(config.hidden_size for config in texts)
    if width != unet.cross_attention_dim:
        raise FastsdError(
            f"its text encoders give {width} features, its UNet reads {unet.cross_attention_dim}; "
            "they belong to different families",
            path=path,
        )
    if vae is not None and (vae.in_channels, vae.out_channels) != (3, 3):
        raise FastsdError(
            f"its autoencoder reads {vae.in_channels} channels and gives {vae.out_channels}; images have 3", path=path
        )
    latent = unet.out_channels if vae is None else vae.latent_channels
    if unet.out_channels != latent:
        raise FastsdError(
            f"its UNet gives {unet.out_channels} channels, its autoencoder's latents have {latent}; "
            "they belong to different families",
            path=path,
        )
    if unet.reads is None:
        what = _OTHER_WIDTHS.get(unet.in_channels) if latent == 4 else None
        raise FastsdError(
            f"its UNet reads {unet.in_channels} channels{f', as {what}' if what else ''}; fastsd runs UNets that read "
            f"{latent}, {latent + 1} (a depth map), {2 * latent} (InstructPix2Pix) or {2 * latent + 1} (inpainting)",
            path=path,
        )
    if unet.addition_time_embed_dim:
        pooled = texts[-1].projection_dim or texts[-1].hidden_size
        features = pooled + (5 if scored else 6) * unet.addition_time_embed_dim
        expected = unet.projection_class_embeddings_input_dim
        if features != expected:
            raise FastsdError(f"text and sizes give {features} added features, the UNet reads {expected}", path=path)
