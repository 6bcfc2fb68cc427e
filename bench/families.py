"""The model families of `--models`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fastsd.components import Components
from fastsd.config import (
    CLIP_L,
    OPENCLIP_BIGG,
    OPENCLIP_H,
    SD15_UNET,
    SD21_UNET,
    SD_VAE,
    SDXL_UNET,
    SDXL_VAE,
    CLIPConfig,
    SchedulerConfig,
    UNetConfig,
    VAEConfig,
)
from fastsd.errors import FastsdError


@dataclass(frozen=True)
class ModelFamily:
    """The configs of all networks of a model, and the image size in pixels for its benchmarks."""

    title: str
    unet: UNetConfig
    vae: VAEConfig
    text: tuple[CLIPConfig, ...]
    size: int
    scheduler: SchedulerConfig = SchedulerConfig(sampler="ddim")


SD15 = ModelFamily("SD1.5", SD15_UNET, SD_VAE, (CLIP_L,), 512)
SD21 = ModelFamily(
    "SD2.1", SD21_UNET, SD_VAE, (OPENCLIP_H,), 768, SchedulerConfig(prediction_type="v_prediction", sampler="ddim")
)
SDXL = ModelFamily("SDXL", SDXL_UNET, SDXL_VAE, (CLIP_L, OPENCLIP_BIGG), 1024, SchedulerConfig(sampler="euler"))
# Every kind of layer of the real families, at tiny sizes: the model of a check without --benchmark.
TINY_TEXT = replace(CLIP_L, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
TINY = ModelFamily(
    "tiny",
    replace(
        SD15_UNET, block_out_channels=(32, 64), transformer_layers_per_block=(1, 0), num_attention_heads=(2, 4),
        cross_attention_dim=32, norm_num_groups=8, layers_per_block=1, mid_transformer_layers=1,
    ),
    replace(SD_VAE, block_out_channels=(8, 16, 16, 16), layers_per_block=1, norm_num_groups=4),
    (TINY_TEXT,),
    64,
)  # fmt: skip
FAMILIES = {"sd15": SD15, "sd21": SD21, "sdxl": SDXL, "tiny": TINY}


def choose(names: str) -> list[str]:
    """ "sd15,sdxl" as a list of names.

    Raises:
        FastsdError: a name is unknown, or there is none.
    """
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    for name in chosen:
        if name not in (*FAMILIES, "digits"):
            raise FastsdError(f"--models: there is no {name!r}; there are {', '.join(FAMILIES)}, digits")
    if not chosen:
        raise FastsdError(f"--models is empty; there are {', '.join(FAMILIES)}, digits")
    return chosen


def family_of(components: Components) -> ModelFamily:
    """The configs of a model in memory."""
    text = tuple(encoder.config for encoder in components.text_encoders)
    size = components.sample_size * components.vae.config.downscale
    return ModelFamily(components.name, components.unet.config, components.vae.config, text, size, components.scheduler)
