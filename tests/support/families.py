"""Tiny random models of every family, built and saved by diffusers and transformers; and calls of pipelines."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from fastsd.model.tokenizer import Tokenizer
from tests.support.folders import edit_json

SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
}
ATTENTION_ABOVE = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
ATTENTION_BELOW = {  # as in SDXL
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "use_linear_projection": True,
}


def disturbed(module: Any) -> Any:
    """Add noise to every parameter, since an initial 0 or 1 would hide a mistake."""
    for parameter in module.parameters():
        parameter.data += 0.03 * torch.randn_like(parameter)
    return module.eval()


def make_unet(**changes: Any) -> Any:
    import diffusers

    config: dict[str, Any] = {
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "sample_size": 8,
        "norm_num_groups": 8,
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
        **ATTENTION_ABOVE,
    }
    return disturbed(diffusers.UNet2DConditionModel(**config | changes))


def make_vae() -> Any:
    import diffusers

    return disturbed(
        diffusers.AutoencoderKL(
            block_out_channels=(8, 16, 16, 16),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            sample_size=64,
        )
    )


def make_text(tokenizer: Any, projection: int = 0, act: str = "quick_gelu") -> Any:
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=projection or 32,
        hidden_act=act,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    model_class = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return disturbed(model_class(config))


def make_depth(base: Any) -> Any:
    """SD 2's depth model with the networks of `base`, without the one that measures depth."""
    import diffusers

    parts = {name: getattr(base, name) for name in ("vae", "text_encoder", "tokenizer", "scheduler")}
    unet = make_unet(in_channels=5, use_linear_projection=True, attention_head_dim=(2, 4))
    nothing: Any = None
    return diffusers.StableDiffusionDepth2ImgPipeline(
        unet=unet, depth_estimator=nothing, feature_extractor=nothing, **parts
    )


def make_pipelines(folder: Path) -> dict[str, Any]:
    """A diffusers pipeline of every family, saved in a folder of that name."""
    import diffusers
    import transformers

    Tokenizer().save(folder / "tokenizer")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")

    def plain(pipeline_class: Any, prediction: str = "epsilon", **unet: Any) -> Any:
        return pipeline_class(
            vae=make_vae(),
            text_encoder=make_text(tokenizer, act="gelu" if unet.get("use_linear_projection") else "quick_gelu"),
            tokenizer=tokenizer,
            unet=make_unet(**unet),
            scheduler=diffusers.DDIMScheduler(timestep_spacing="leading", prediction_type=prediction, **SCHEDULE),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    def xl(pipeline_class: Any, encoders: int, in_channels: int = 4, **changes: Any) -> Any:
        sizes = 6 if encoders == 2 else 5
        unet = make_unet(
            **ATTENTION_BELOW,
            projection_class_embeddings_input_dim=24 + 8 * sizes,
            cross_attention_dim=32 * encoders,
            in_channels=in_channels,
        )
        return pipeline_class(
            vae=make_vae(),
            text_encoder=make_text(tokenizer) if encoders == 2 else None,
            text_encoder_2=make_text(tokenizer, 24, "gelu"),
            tokenizer=tokenizer if encoders == 2 else None,
            tokenizer_2=tokenizer,
            unet=unet,
            scheduler=diffusers.EulerDiscreteScheduler(
                timestep_spacing="leading", **{k: SCHEDULE[k] for k in list(SCHEDULE)[:4]}
            ),
            add_watermarker=False,
            **changes,
        )

    pipelines = {
        "sd1": plain(diffusers.StableDiffusionPipeline),
        "sd2": plain(
            diffusers.StableDiffusionPipeline,
            prediction="v_prediction",
            use_linear_projection=True,
            attention_head_dim=(2, 4),
        ),
        "inpainting": plain(diffusers.StableDiffusionInpaintPipeline, in_channels=9),
        "pix2pix": plain(diffusers.StableDiffusionInstructPix2PixPipeline, in_channels=8),
        "sdxl": xl(diffusers.StableDiffusionXLPipeline, 2),
        "sdxl pix2pix": xl(diffusers.StableDiffusionXLInstructPix2PixPipeline, 2, 8),
        "sdxl pix2pix scaled": xl(diffusers.StableDiffusionXLInstructPix2PixPipeline, 2, 8, is_cosxl_edit=True),
        "refiner": xl(diffusers.StableDiffusionXLImg2ImgPipeline, 1, requires_aesthetics_score=True),
    }
    pipelines["depth"] = make_depth(pipelines["sd2"])
    save_pipelines(pipelines, folder)
    return pipelines


def save_pipelines(pipelines: dict[str, Any], folder: Path) -> None:
    """Each in a folder of its name."""
    for name, pipeline in pipelines.items():
        pipeline.set_progress_bar_config(disable=True)
        pipeline.save_pretrained(folder / name)
    edit_json(folder / "sdxl pix2pix scaled/model_index.json", is_cosxl_edit=True)  # which diffusers does not write


class Families:
    """The pipelines that diffusers saved: `pipelines[name]` in memory, `folder / name` on disk."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.pipelines = make_pipelines(folder)


TOLERANCE = 1e-4  # of latents after the whole loop


def latents_of(pipeline: Any, prompt: str, **arguments: Any) -> torch.Tensor:
    """The latents that a pipeline, ours or diffusers', generates."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pipeline(prompt, output_type="latent", **arguments).images


def generator(seed: int) -> list[torch.Generator]:
    """diffusers' generators for one image, which give the noise of our `seed`."""
    return [torch.Generator().manual_seed(seed)]
