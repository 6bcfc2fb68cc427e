"""The layouts of single files: one row per model family.

A row states where the keys of each network start and what the tensors' shapes do not tell. `family.py` reads everything
else from the shapes. Loading, inspecting and converting use these rows, so a new family or layout is one more row
(docs/checkpoints.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from fastsd.config import SD_VAE, SDXL_VAE, VAEConfig
from fastsd.weights.layouts.ldm_names import UNET_PREFIX, VAE_PREFIX


@dataclass(frozen=True)
class TextEncoderLayout:
    """A text encoder in a single file.

    Attributes:
        folder: the name of its folder in the diffusers layout.
        prefix: what its keys start with.
        openclip: the keys are OpenCLIP's; otherwise they are those of transformers' CLIP.
        truncated: the UNet reads the second-to-last layer, so the last layer and the projection are not loaded.
    """

    folder: str
    prefix: str
    openclip: bool = False
    truncated: bool = False


@dataclass(frozen=True)
class FileLayout:
    """A model family's single files.

    Attributes:
        family: the name in messages and in `fastsd inspect`.
        texts: the text encoders, in the order in which their features are concatenated.
        sampler: the sampler of the published folders.
        spacing: of their timesteps; None: they do not state it.
        vae: the autoencoder preset that gives `scaling_factor` and `force_upcast`.
        prediction: what the network predicts if the file does not say; None: the user has to say it.
        sample_size: side of the latents that the family was trained on.
        sample_size_v: the same for models that predict v, if it differs.
        size_inputs: how many sizes and coordinates the added conditioning (`label_emb`) holds; 0: the UNet has none.
        zeros_for_empty_prompt, aesthetic_score: as in `fastsd.components.Components`.
        few_step: the kind of few-step model (`fastsd.few_step.KINDS`) that every published file of this layout is.
        unet_prefix, vae_prefix: what the keys of UNet and autoencoder start with.
    """

    family: str
    texts: tuple[TextEncoderLayout, ...]
    sampler: str
    spacing: str | None = None
    vae: VAEConfig = SD_VAE
    prediction: str | None = "epsilon"
    sample_size: int = 64
    sample_size_v: int | None = None
    size_inputs: int = 0
    zeros_for_empty_prompt: bool = False
    aesthetic_score: bool = False
    few_step: str | None = None
    unet_prefix: str = UNET_PREFIX
    vae_prefix: str = VAE_PREFIX


# A file has the first layout whose UNet, text encoders and added conditioning it holds. Converting chooses by
# `layout_for`.
FILE_LAYOUTS: tuple[FileLayout, ...] = (
    FileLayout(
        "SDXL",
        (
            TextEncoderLayout("text_encoder", "conditioner.embedders.0.transformer."),
            TextEncoderLayout("text_encoder_2", "conditioner.embedders.1.model.", openclip=True),
        ),
        sampler="euler",
        spacing="leading",
        vae=SDXL_VAE,
        sample_size=128,
        size_inputs=6,  # original height and width, crop top and left, target height and width
        zeros_for_empty_prompt=True,
    ),
    FileLayout(
        "SDXL refiner",
        (TextEncoderLayout("text_encoder_2", "conditioner.embedders.0.model.", openclip=True),),
        sampler="euler",
        spacing="leading",
        vae=SDXL_VAE,
        sample_size=128,
        size_inputs=5,  # original height and width, crop top and left, aesthetic score
        aesthetic_score=True,
    ),
    FileLayout("SD 1", (TextEncoderLayout("text_encoder", "cond_stage_model.transformer."),), sampler="pndm"),
    FileLayout(
        "SD 2",
        (TextEncoderLayout("text_encoder", "cond_stage_model.model.", openclip=True, truncated=True),),
        sampler="ddim",
        prediction=None,  # published with either
        sample_size_v=96,
    ),
    FileLayout(  # SD 2 as Stability's later code stores it, in which SD-Turbo alone was published
        "SD-Turbo",
        (TextEncoderLayout("text_encoder", "conditioner.embedders.0.model.", openclip=True, truncated=True),),
        sampler="euler",
        few_step="turbo",
    ),
)


def layout_for(
    text_folders: list[str],
    added_conditioning: bool,
    openclip: bool,
    scaling_factor: float,
    few_step: str | None = None,
) -> FileLayout | None:
    """The layout to write a model in; None if no family has such text encoders.

    Args:
        text_folders: the folders of its text encoders, in their order.
        added_conditioning: its UNet reads sizes in addition to the text.
        openclip, scaling_factor, few_step: of its last text encoder, its autoencoder and itself. They choose between
            the families that agree in the rest; if several fit equally well, the first is chosen.
    """
    rows = [
        row
        for row in FILE_LAYOUTS
        if [text.folder for text in row.texts] == text_folders and bool(row.size_inputs) == added_conditioning
    ]
    return min(
        rows,
        key=lambda row: (
            row.texts[-1].openclip != openclip,
            row.vae.scaling_factor != scaling_factor,
            row.few_step != few_step,
        ),
        default=None,
    )
