"""Stable Diffusion at its real sizes against diffusers and transformers, with the same random weights, in fp32.

`make parity` prints the table of docs/parity.md. diffusers' model is saved, run and freed before fastsd loads the saved
folder, so only one is in memory at a time (16 GB for SDXL, and as much disk).
"""

from __future__ import annotations

import gc
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsd.components import Components
from fastsd.config import SD15_UNET, SD21_UNET, SDXL_UNET
from fastsd.model.tokenizer import Tokenizer
from fastsd.model.unet import AddedConditioning
from fastsd.pipeline import Pipeline
from fastsd.weights import load_folder
from fastsd.weights.layouts.controlnet import load_controlnet
from tests.support.families import SCHEDULE
from tests.support.matching import nchw, nhwc, relative_error

Outputs = dict[str, torch.Tensor]
MODULE, IMAGE = 1e-5, 1e-4  # of the largest value
PROMPT, NEGATIVE = "a lighthouse at dusk, oil on canvas", "fog"

# The published unet/config.json, where it differs from diffusers' defaults (SD1.5's).
SD15: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SD21: dict[str, Any] = {
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
SDXL: dict[str, Any] = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SIZES = {"SD1.5": SD15, "SD2.1": SD21, "SDXL": SDXL}
# The published text_encoder/config.json: width, feed-forward, layers, heads, activation, projection.
CLIP_L = (768, 3072, 12, 12, "quick_gelu", 768)
OPENCLIP_H = (1024, 4096, 23, 16, "gelu", 512)
OPENCLIP_BIGG = (1280, 5120, 32, 20, "gelu", 1280)

pytestmark = pytest.mark.parity
ROWS: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def report() -> Any:
    """Print the table at the end."""
    yield
    print("\n| model | what | relative error | allowed |\n|---|---|---|---|")
    print("\n".join(ROWS))


@pytest.mark.parametrize("family", SIZES)
@torch.no_grad()
def test_full_size(family: str, tmp_path: Path) -> None:
    """Every network at the model's own size, and two steps of a guided image at 512 x 512."""
    try:
        theirs = outputs_of_diffusers(family, tmp_path)
        gc.collect()
        ours = outputs_of_fastsd(tmp_path)
    finally:
        shutil.rmtree(tmp_path, ignore_errors=True)
    assert ours.keys() == theirs.keys()
    wrong = []
    for name, expected in theirs.items():
        allowed = IMAGE if name.startswith("image") else MODULE
        error = relative_error(ours[name], expected)
        ROWS.append(f"| {family} | {name} | {error:.1e} | {allowed:.0e} |")
        assert expected.isfinite().all() and float(expected.std()) > 1e-3, f"{name}: nothing to compare"
        if not error < allowed:
            wrong.append(ROWS[-1])
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("family", SIZES)
@torch.no_grad()
def test_controlnet_at_full_size(family: str, tmp_path: Path) -> None:
    """A ControlNet's residuals at the model's own size: the largest error of all maps."""
    import diffusers

    torch.manual_seed(0)
    config = {key: value for key, value in SIZES[family].items() if key not in ("sample_size", "up_block_types")}
    net = diffusers.ControlNetModel(**config)
    disturb(net)
    for name, parameter in net.named_parameters():
        if name.startswith("controlnet_") and not parameter.any():  # initialised to 0
            parameter.copy_(torch.randn_like(parameter) / parameter[0].numel() ** 0.5)
    size = SIZES[family]["sample_size"]
    tensors = random_inputs(net, size, pooled=1280)
    photo = torch.rand(1, 3, 8 * size, 8 * size, generator=torch.Generator().manual_seed(2))
    their_added = {"text_embeds": tensors["pooled"], "time_ids": tensors["sizes"]} if family == "SDXL" else None
    x, timestep, context = tensors["x"], tensors["timestep"], tensors["context"]
    down, middle = net(x, timestep, context, photo, 0.7, added_cond_kwargs=their_added, return_dict=False)
    net.save_pretrained(tmp_path)
    del net
    gc.collect()
    ours = load_controlnet(tmp_path, {"SD1.5": SD15_UNET, "SD2.1": SD21_UNET, "SDXL": SDXL_UNET}[family], torch.float32)
    shutil.rmtree(tmp_path)
    added = AddedConditioning(tensors["pooled"], tensors["sizes"]) if family == "SDXL" else None
    time, key_values = ours.embed_time(timestep, added), ours.project_context(context)
    hint = ours.embed_hint(nhwc(photo))
    residuals = ours.denoise(nhwc(x), time, key_values, hint, torch.tensor([0.7]))
    errors = []
    for residual, expected in zip(residuals, (*down, middle), strict=True):
        assert expected.isfinite().all() and float(expected.std()) > 1e-3, "nothing to compare"
        errors.append(relative_error(nchw(residual), expected))
    ROWS.append(f"| {family} | ControlNet, the worst of {len(errors)} maps | {max(errors):.1e} | {MODULE:.0e} |")
    assert max(errors) < MODULE, errors


def random_inputs(unet: Any, sample_size: int, pooled: int) -> Outputs:
    """The same random inputs for both programs: one sample at the model's own size."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "x": normal(1, 4, sample_size, sample_size),
        "context": normal(1, 77, unet.config.cross_attention_dim),
        "timestep": torch.tensor([701.0]),
        "pooled": normal(1, pooled),
        "sizes": torch.tensor([[1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0]]),
        "latent": normal(1, 4, 64, 64),
        "image": normal(1, 3, 512, 512).clamp(-1, 1),
        "noise": normal(1, 4, 64, 64),
    }


def image_settings(noise: torch.Tensor) -> dict[str, Any]:
    return {
        "negative_prompt": NEGATIVE,
        "num_inference_steps": 2,
        "guidance_scale": 5.0,
        "height": 512,
        "width": 512,
        "latents": noise.clone(),
        "output_type": "latent",
    }


def outputs_of_diffusers(family: str, folder: Path) -> Outputs:
    """Run a model with random weights and save it to `folder`."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = make_pipeline(family, folder)
        pipeline.save_pretrained(folder)
    tensors = random_inputs(pipeline.unet, pipeline.unet.config.sample_size, pooled=1280)
    added = {"text_embeds": tensors["pooled"], "time_ids": tensors["sizes"]} if family == "SDXL" else None
    x, timestep, context = tensors["x"], tensors["timestep"], tensors["context"]
    outputs = {"UNet": pipeline.unet(x, timestep, context, added_cond_kwargs=added).sample}
    distribution = pipeline.vae.encode(tensors["image"]).latent_dist
    outputs |= {"VAE encoder, mean": distribution.mean, "VAE encoder, log variance": distribution.logvar}
    outputs["VAE decoder"] = pipeline.vae.decode(tensors["latent"]).sample
    encoders = (pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None))
    for i, encoder in enumerate(encoder for encoder in encoders if encoder is not None):
        text = encoder(Tokenizer()(PROMPT), output_hidden_states=True)
        outputs[f"text encoder {i + 1}, penultimate layer"] = text.hidden_states[-2]
        outputs[f"text encoder {i + 1}, last layer"] = text.last_hidden_state
        outputs[f"text encoder {i + 1}, pooled"] = text.text_embeds if "text_embeds" in text else text.pooler_output
    outputs["image, 2 guided steps"] = pipeline(PROMPT, **image_settings(tensors["noise"])).images
    return outputs


def outputs_of_fastsd(folder: Path) -> Outputs:
    """Run the model that diffusers saved."""
    components: Components = load_folder(folder, torch.float32)
    unet, vae = components.unet, components.vae
    tensors = random_inputs(unet, components.sample_size, pooled=1280)
    added = AddedConditioning(tensors["pooled"], tensors["sizes"]) if unet.add_embedding is not None else None
    out = unet(nhwc(tensors["x"]), tensors["timestep"], tensors["context"], added)
    outputs = {"UNet": nchw(out)}
    distribution = vae.encode(nhwc(tensors["image"]))
    outputs |= {"VAE encoder, mean": nchw(distribution.mean)}
    outputs |= {"VAE encoder, log variance": nchw(distribution.logvar)}
    outputs["VAE decoder"] = nchw(vae.decode(nhwc(tensors["latent"])))
    for i, (encoder, tokenizer) in enumerate(zip(components.text_encoders, components.tokenizers, strict=True)):
        ids = tokenizer(PROMPT)
        outputs[f"text encoder {i + 1}, penultimate layer"] = encoder(ids, hidden_layer=-2).hidden
        text = encoder(ids)
        outputs[f"text encoder {i + 1}, last layer"] = text.hidden
        outputs[f"text encoder {i + 1}, pooled"] = text.pooled
    pipe = Pipeline(components, torch.device("cpu"), torch.float32)
    outputs["image, 2 guided steps"] = pipe(PROMPT, **image_settings(tensors["noise"])).images
    return outputs


def make_pipeline(family: str, folder: Path) -> Any:
    """diffusers' pipeline of a family with its default random weights, norms and biases disturbed."""
    import diffusers
    import transformers

    Tokenizer().save(folder / "vocabulary")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "vocabulary")
    parts: dict[str, Any] = {
        "unet": diffusers.UNet2DConditionModel(**SIZES[family]),
        "vae": make_vae(0.13025 if family == "SDXL" else 0.18215),
        "text_encoder": make_text(OPENCLIP_H if family == "SD2.1" else CLIP_L, transformers.CLIPTextModel),
        "tokenizer": tokenizer,
    }
    schedule = SCHEDULE | {"prediction_type": "v_prediction" if family == "SD2.1" else "epsilon"}
    parts["scheduler"] = diffusers.DDIMScheduler(**schedule)
    if family == "SDXL":
        parts["text_encoder_2"] = make_text(OPENCLIP_BIGG, transformers.CLIPTextModelWithProjection)
        pipeline = diffusers.StableDiffusionXLPipeline(**parts, tokenizer_2=tokenizer, add_watermarker=False)
    else:
        none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipeline = diffusers.StableDiffusionPipeline(**parts, **none)
    pipeline.set_progress_bar_config(disable=True)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if name in parts:
            disturb(parts[name])
    return pipeline


def make_vae(scaling_factor: float) -> Any:
    import diffusers

    return diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        sample_size=512,
        scaling_factor=scaling_factor,
    )


def make_text(sizes: tuple[int, int, int, int, str, int], model_class: Callable[[Any], Any]) -> Any:
    import transformers

    width, inner, layers, heads, activation, projection = sizes
    return model_class(
        transformers.CLIPTextConfig(
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            hidden_act=activation,
            projection_dim=projection,
            bos_token_id=49406,
            eos_token_id=49407,
        )
    )


def disturb(module: Any) -> None:
    """Change norm weights from 1 and biases from 0, so that none can be left out or swapped unnoticed."""
    module.eval()
    for parameter in module.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
